"""Causal Goodhart: at the same perplexity, does it matter which component was harmed?"""

from __future__ import annotations

import itertools

import numpy as np

from bitalloc.analyses.study import COMPONENT, REFERENCE, Sample, Study
from bitalloc.statistics import mean_interval, two_sided_p

GRID = 21


def causal(study: Study) -> None:
    """`matched_points`: gold of one component's plans less that of another's, at equal loss; mean over common losses.

    The plans of a component and the reference make a curve of gold against loss (or KL), straight from plan to
    plan; two curves are compared where both have losses. 0 for all pairs: the proxy carries all that the gold
    loses, whatever was harmed (a sufficient mediator). Items and windows are drawn anew, plans stay.
    """
    part = study.plans[study.plans["strategy"] == COMPONENT]
    members = {str(budget): group["plan"].tolist() for budget, group in part.groupby("budget", sort=False)}
    for (a, plans_a), (b, plans_b) in itertools.combinations(members.items(), 2):
        budget = f"{a} - {b.removeprefix(f'{COMPONENT} ')}"
        for proxy, gold in itertools.product(
            (name for name in study.sets if name.startswith(("nll:", "kl:"))), study.golds
        ):
            losses, golds = (study.sample(name, [*plans_a, *plans_b]) for name in (proxy, gold))
            if REFERENCE not in golds.scores.plans:
                continue
            matched = _matched(losses, golds, plans_a, plans_b)
            if matched is None:
                row = {"proxy": proxy, "gold": gold, "budget": budget, "n": golds.n}
                study.add("causal", "matched_points", np.nan, status="no_overlap", **row)
                continue
            value, value_R = matched
            found = mean_interval(value, value_R, golds.units, 1e4 * golds.extra)
            p = two_sided_p(found.value, found.deviation, found.df)
            study.add_estimate("causal", "matched_points", found, proxy=proxy, gold=gold, budget=budget, n=golds.n, p=p)


def _matched(losses: Sample, golds: Sample, plans_a: list[str], plans_b: list[str]) -> tuple[float, np.ndarray] | None:
    """The mean difference in points over the losses that both curves have, and its bootstrap."""
    curves, point = [], []
    for plans in (plans_a, plans_b):
        known = REFERENCE in losses.scores.plans  # KL has no reference: it is 0 there
        x_P = losses.means(plans) - (losses.means([REFERENCE])[0] if known else 0.0)
        x_RP = losses.resampled(plans) - (losses.resampled([REFERENCE]) if known else 0.0)
        point.append((np.append(0.0, x_P), 100 * golds.means([REFERENCE, *plans])))
        curves.append((np.pad(x_RP, ((0, 0), (1, 0))), 100 * golds.resampled([REFERENCE, *plans])))
    hi = min(x.max() for x, _ in point)
    if not hi > 0:
        return None
    grid = np.linspace(0, hi, GRID)[1:]
    value, value_R = (
        np.subtract(*(mean_between(x, y, grid) for x, y in pair))
        for pair in (((x[None], y[None]) for x, y in point), curves)
    )
    return float(value[0]), value_R


def mean_between(x_RP: np.ndarray, y_RP: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Mean over the grid of the straight lines through the points (x, y) of each row, in the order of x; flat beyond.

    >>> mean_between(np.array([[0.0, 4.0, 2.0]]), np.array([[10.0, 0.0, 8.0]]), np.array([1.0, 3.0]))
    array([6.5])
    """
    order_RP = np.argsort(x_RP, axis=1, kind="stable")
    x_RP, y_RP = (np.take_along_axis(each, order_RP, 1) for each in (x_RP, y_RP))
    left_RG = np.clip((x_RP[:, :, None] <= grid).sum(1) - 1, 0, x_RP.shape[1] - 2)
    (x_RG, u_RG), (y_RG, v_RG) = (
        [np.take_along_axis(each, left_RG + step, 1) for step in (0, 1)] for each in (x_RP, y_RP)
    )
    share_RG = np.clip((grid - x_RG) / np.maximum(u_RG - x_RG, 1e-12), 0, 1)
    return (y_RG + share_RG * (v_RG - y_RG)).mean(1)
