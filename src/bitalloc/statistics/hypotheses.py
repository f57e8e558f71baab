"""Tests, their corrections for being many, and what they could have seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, stdtr  # scipy.stats would take a second at every start of snakemake


def mcnemar_p(only_a: np.ndarray | int, only_b: np.ndarray | int) -> np.ndarray:
    """Exact two-sided McNemar test: p = min(1, 2 P(X <= min(a, b))), X ~ Binomial(a + b, 1/2).

    a, b = items that only one of the two plans gets right (McNemar 1947; exact form).

    >>> from scipy.stats import binomtest
    >>> abs(float(mcnemar_p(3, 14)) - float(binomtest(3, 17).pvalue)) < 1e-12, float(mcnemar_p(0, 0))
    (True, 1.0)
    """
    return np.minimum(1.0, 2 * bdtr(np.minimum(only_a, only_b).astype(float), np.add(only_a, only_b), 0.5))


def two_sided_p(value: float, deviation: float, df: float) -> float:
    """2 P(T >= |value| / deviation), T of Student's t; 1 where nothing deviates.

    >>> round(two_sided_p(1.96, 1.0, 1e9), 3), two_sided_p(0.0, 0.0, 9)
    (0.05, 1.0)
    """
    if not deviation > 0:
        return 1.0
    return float(2 * stdtr(df, -abs(value) / deviation))


def equivalence_p(value: float, deviation: float, df: float, margin: float) -> float:
    """Two one-sided tests (Schuirmann 1987): p = max(P(T >= (value + m) / s), P(T >= (m - value) / s)).

    Small: the difference lies within +- margin. "Not significant" never says so.

    >>> round(equivalence_p(0.2, 0.4, 1e9, 1.0), 3), round(equivalence_p(0.9, 0.4, 1e9, 1.0), 2)
    (0.023, 0.4)
    """
    if not deviation > 0:
        return float(abs(value) >= margin)
    return float(max(stdtr(df, -(margin + value) / deviation), stdtr(df, -(margin - value) / deviation)))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment: p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)) (Holm 1979).

    >>> holm([0.04, 0.01, 0.03]).round(2).tolist()
    [0.06, 0.03, 0.06]
    """
    order = np.argsort(p)
    stepped = np.maximum.accumulate(np.minimum(1.0, np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    adjusted = np.empty(len(p))
    adjusted[order] = stepped
    return adjusted


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Step-up adjustment: p_(i) -> min over j >= i of min(1, m p_(j) / j) (Benjamini and Hochberg 1995).

    >>> benjamini_hochberg([0.04, 0.01, 0.03]).round(2).tolist()
    [0.04, 0.03, 0.04]
    """
    order = np.argsort(p)[::-1]
    stepped = np.minimum(1.0, np.asarray(p, dtype=float)[order] * len(p) / np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum.accumulate(stepped)
    return adjusted


def detectable_points(discordant: float, n: int) -> float:
    """Smallest paired difference found with 80 % power at the 5 % level: 100 x max(2.8 sqrt(q / n), 6 / n) points.

    q = share of items on which two plans differ; independent items assumed. 2.8 = z(.975) + z(.8); the variance of
    a paired difference is at most q / n. Fewer than 6 discordant items, even all of one kind, are not significant in
    the exact test (2 / 2^5 = .0625).

    >>> round(detectable_points(0.10, 1319), 1), round(detectable_points(0.0, 50), 1)
    (2.4, 12.0)
    """
    return 100 * float(max(2.8 * np.sqrt(discordant / n), 6 / n))
