"""Does the gold keep rising as one chooses harder by the proxy?"""

from __future__ import annotations

import numpy as np

from bitalloc.analyses.study import ALL, MIN_PLANS, Proxy, Sample, Study
from bitalloc.statistics import best_of, overoptimisation_rows, pressure, two_sided_p, two_way
from bitalloc.statistics.intervals import LEVEL, quantile

Bootstraps = tuple[np.ndarray, np.ndarray, np.ndarray]  # plans, items, both, each [R, n]


def overoptimisation(study: Study) -> None:
    """Gold of the proxy's best of n random plans less the mean plan's, n = 1 .. pool, in points, and its bend.

    `gain_best_of_n` is the exact mean over all subsets of n plans; `alpha_points` and `beta_points` fit gain =
    d (alpha - beta d), d the `pressure` of choosing. beta > 0: returns diminish, which a gold with a ceiling does under
    any proxy. `turning_pressure` = alpha / (2 beta), where the gold begins to fall, is given where beta's interval lies
    above 0, and is `beyond` where no choice among so many plans gets there. Means over the strata.
    """
    strata = [pool for pool in map(study.pool, study.strata) if len(pool) >= MIN_PLANS]
    for proxy, values, gold, task in study.pairs():
        place = {"proxy": proxy, "gold": gold, "budget": ALL, "n": sum(map(len, strata))}
        if not strata:
            status = study.status(gold, ALL)
            study.add(
                "overoptimisation", "beta_points", np.nan, **place, status="too_few" if status == "ok" else status
            )
            continue
        curves = [_curve(study, values, task, pool) for pool in strata]
        plans = min(map(len, strata))
        for n in sorted({*(2**k for k in range(1, plans.bit_length())), plans}):
            _row(
                study,
                f"gain_best_of_{n}",
                *_mean([_apply(curve, best_of(_size(curve))[n - 1]) for curve in curves]),
                **place,
            )
        rows = {_size(curve): overoptimisation_rows(_size(curve)) for curve in curves}
        alpha, beta = (_mean([_apply(curve, rows[_size(curve)][i]) for curve in curves]) for i in (0, 1))
        _row(study, "alpha_points", *alpha, **place)
        lo = _row(study, "beta_points", *beta, **place, test=True)
        if lo > 0:
            _turning(study, alpha, beta, float(pressure(plans)), place)


def _curve(study: Study, proxy: Proxy, task: Sample, plans: list[str]) -> tuple[np.ndarray, Bootstraps]:
    """Points of gold above the mean plan's, in the proxy's order, best first: as measured and in each bootstrap."""
    drawn_RP = study.drawn("pool " + plans[0], len(plans))
    x_P, x_RP = proxy.means(plans), proxy.resampled(plans, study.settings.resamples)
    y_P, y_RP = task.means(plans), task.resampled(plans)

    def ordered(x_RP: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
        sorted_RP = np.take_along_axis(y_RP, np.argsort(x_RP, axis=1, kind="stable"), 1)
        return 100 * (sorted_RP - y_RP.mean(1, keepdims=True))

    both = (np.take_along_axis(each, drawn_RP, 1) for each in (x_RP, y_RP))
    return ordered(x_P[None], y_P[None])[0], (
        ordered(x_P[drawn_RP], y_P[drawn_RP]),
        ordered(x_RP, y_RP),
        ordered(*both),
    )


def _size(curve: tuple[np.ndarray, Bootstraps]) -> int:
    return len(curve[0])


def _apply(curve: tuple[np.ndarray, Bootstraps], row_P: np.ndarray) -> tuple[float, np.ndarray]:
    point_P, bootstraps = curve
    return float(point_P @ row_P), np.stack([each @ row_P for each in bootstraps])


def _mean(strata: list[tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
    return float(np.mean([value for value, _ in strata])), np.mean([found for _, found in strata], axis=0)


def _row(
    study: Study, statistic: str, value: float, found_VR: np.ndarray, *, test: bool = False, **place: object
) -> float:
    """Add the row and return the lower end."""
    deviation, df = two_way(*found_VR), int(place["n"]) - 1
    half = quantile(df) * deviation
    p = two_sided_p(value, deviation, df) if test else np.nan
    study.add("overoptimisation", statistic, value, lo=value - half, hi=value + half, p=p, **place)
    return value - half


def _turning(study: Study, alpha: tuple, beta: tuple, reached: float, place: dict) -> None:
    """alpha / (2 beta), with percentiles over the bootstrap of both in which the curve bends down."""
    value, (alpha_R, beta_R) = alpha[0] / (2 * beta[0]), (alpha[1][-1], beta[1][-1])
    lo, hi = np.quantile(alpha_R[beta_R > 0] / (2 * beta_R[beta_R > 0]), [1 - LEVEL, LEVEL])
    status = study.status(place["gold"], ALL)
    beyond = {"status": "beyond"} if status == "ok" and value > reached else {}
    study.add("overoptimisation", "turning_pressure", value, lo=float(lo), hi=float(hi), **place, **beyond)
