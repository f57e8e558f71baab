"""Extremal Goodhart: does the relation of proxy and gold bend where the damage is large?"""

from __future__ import annotations

import numpy as np

from bitalloc.analyses.study import ALL, MIN_PLANS, Proxy, Sample, Study
from bitalloc.statistics import two_sided_p, two_way
from bitalloc.statistics.intervals import quantile


def extremal(study: Study) -> None:
    """`quadratic_points`: c of gold = a + b x + c x^2 over the plans of a stratum, x the proxy in its deviations there.

    c < 0: the gold falls faster the worse the proxy gets, so what is learnt from mild plans is too kind to harsh ones;
    c > 0: the contrary. Least squares; over all budgets the mean of the strata's c. Two-way bootstrap, plans and items.
    """
    for proxy, values, gold, task in study.pairs():
        pooled = []
        for budget, plans in study.strata.items():
            if len(plans) < MIN_PLANS:
                continue
            found = _bend(study, values, task, plans, study.drawn(budget, len(plans), of=f"{len(plans)} plans"))
            if found is not None:
                pooled.append((*found, len(plans)))
                _row(study, pooled[-1:], proxy=proxy, gold=gold, budget=budget)
        if pooled:
            _row(study, pooled, proxy=proxy, gold=gold, budget=ALL)


def _row(study: Study, strata: list[tuple[float, np.ndarray, int]], **place: str) -> None:
    value = float(np.mean([value for value, *_ in strata]))
    n = sum(n for *_, n in strata)
    deviation, df = two_way(*np.mean([found for _, found, _ in strata], axis=0)), n - 3 * len(strata)
    half, p = quantile(df) * deviation, two_sided_p(value, deviation, df)
    study.add("extremal", "quadratic_points", value, lo=value - half, hi=value + half, p=p, n=n, **place)


def _bend(
    study: Study, proxy: Proxy, task: Sample, plans: list[str], drawn_RP: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """c, and its three bootstraps [V, R]; None where the proxy does not vary."""
    x_P, x_RP = proxy.means(plans), proxy.resampled(plans, study.settings.resamples)
    y_P, y_RP = 100 * task.means(plans), 100 * task.resampled(plans)
    centre, scale = x_P.mean(), x_P.std()
    if not scale > 0:
        return None
    x_P, x_RP = (x_P - centre) / scale, (x_RP - x_RP.mean(1, keepdims=True)) / scale
    both = (np.take_along_axis(each, drawn_RP, 1) for each in (x_RP, y_RP))
    variants = ((x_P[drawn_RP], y_P[drawn_RP]), (x_RP, y_RP), tuple(both))
    return float(curvature(x_P[None], y_P[None])[0]), np.stack([curvature(*each) for each in variants])


def curvature(x_RP: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
    """c of the least squares y = a + b x + c x^2 of each row: x^2 cleared of 1 and x, against y.

    >>> x = np.array([[-1.0, 0.0, 1.0, 2.0]])
    >>> curvature(x, 3 - x + 2 * x**2).round(6)
    array([2.])
    """
    x_RP = x_RP - x_RP.mean(1, keepdims=True)
    square_RP = x_RP**2 - (x_RP**2).mean(1, keepdims=True)
    slope_R1 = (square_RP * x_RP).sum(1, keepdims=True) / np.maximum((x_RP**2).sum(1, keepdims=True), 1e-12)
    rest_RP = square_RP - slope_R1 * x_RP
    return (rest_RP * y_RP).sum(1) / np.maximum((rest_RP**2).sum(1), 1e-12)
