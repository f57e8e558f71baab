"""Percentile bootstrap of weighted means and medians over windows or items.

Where there are at least `MIN_CLUSTERS` groups, whole groups are drawn; a handful of groups (four languages)
are strata instead, within which the items are drawn, because a bootstrap over a handful of clusters is far
too narrow. Draws depend on the seed and the groups alone, so that two plans scored on the same items are
resampled alike. Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.

Legend: U items, R resamples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
COVERAGE = 0.95
MIN_CLUSTERS = 10


@dataclass(frozen=True)
class Interval:
    """A point estimate and the ends of its 95 % interval; `n` independent units stand behind it."""

    value: float
    lo: float
    hi: float
    n: int


def mean(
    values: npt.ArrayLike, weights: npt.ArrayLike, groups: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """sum(w v) / sum(w); n counts the groups where whole groups are drawn, else the items.

    >>> interval = mean([1.0, 2.0, 6.0], [1, 1, 2], ["a", "a", "a"], resamples=500, seed=0)
    >>> interval.value, interval.n
    (3.75, 3)
    >>> 1.0 <= interval.lo < 3.75 < interval.hi <= 6.0
    True
    >>> mean(range(20), [1] * 20, [item // 2 for item in range(20)], resamples=500, seed=0).n
    10
    """
    value_U, weight_U = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    count_RU, units = _counts(groups, resamples, seed)
    value_R = (count_RU @ (weight_U * value_U)) / (count_RU @ weight_U)
    return _interval(np.average(value_U, weights=weight_U), value_R, units)


def median(values: npt.ArrayLike, groups: npt.ArrayLike, *, resamples: int, seed: int) -> Interval:
    """The middle value, or the mean of the two middle ones.

    >>> median([5.0, 1.0, 2.0, 100.0], ["a"] * 4, resamples=500, seed=0).value
    3.5
    """
    value_U = np.asarray(values, dtype=np.float64)
    count_RU, units = _counts(groups, resamples, seed)
    order = value_U.argsort(kind="stable")
    reached_RU = count_RU[:, order].cumsum(axis=1)
    size_R = reached_RU[:, -1]
    # the k-th smallest of a resample is the first value whose cumulated count exceeds k
    low, high = (value_U[order][(reached_RU > k[:, None]).argmax(axis=1)] for k in ((size_R - 1) // 2, size_R // 2))
    return _interval(np.median(value_U), (low + high) / 2, units)


def standard_error(values: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """sqrt(s^2 / U), s^2 = sum over groups of squared deviations from the group's mean / (U - groups); NaN where U is
    the number of groups. In one group that is lm-eval's `mean_stderr`, in several its `pooled_sample_stderr`.

    >>> round(standard_error([0, 1, 1, 1], ["a"] * 4), 6)  # s^2 = (9/16 + 3/16) / 3
    0.25
    """
    value_U, code_U = np.asarray(values, dtype=np.float64), np.unique(np.asarray(groups), return_inverse=True)[1]
    count_G = np.bincount(code_U)
    if len(value_U) == len(count_G):
        return float("nan")
    deviation_U = value_U - (np.bincount(code_U, value_U) / count_G)[code_U]
    return float(np.sqrt((deviation_U**2).sum() / (len(value_U) - len(count_G)) / len(value_U)))


def _counts(groups: npt.ArrayLike, resamples: int, seed: int) -> tuple[Floats, int]:
    """How often each resample takes each item, [R, U], and how many independent units there are."""
    code_U = np.unique(np.asarray(groups), return_inverse=True)[1]
    return _drawn(tuple(code_U.tolist()), resamples, seed)


@functools.lru_cache(maxsize=16)
def _drawn(codes: tuple[int, ...], resamples: int, seed: int) -> tuple[Floats, int]:
    rng, code_U = np.random.default_rng(seed), np.array(codes)
    clusters = max(codes) + 1
    if clusters >= MIN_CLUSTERS:
        return _multinomial(rng, clusters, resamples)[:, code_U], clusters
    count_RU = np.empty((resamples, len(codes)))
    for group in range(clusters):
        members = np.flatnonzero(code_U == group)
        count_RU[:, members] = _multinomial(rng, len(members), resamples)
    return count_RU, len(codes)


def _multinomial(rng: np.random.Generator, units: int, resamples: int) -> Floats:
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def _interval(value: float, value_R: Floats, units: int) -> Interval:
    lo, hi = np.quantile(value_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(value), float(lo), float(hi), units)
