"""Rank correlations of two scores over the same plans, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spearman(x_RP: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row: Pearson's of the average ranks; NaN where a row is constant.

    >>> spearman(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[9.0, 7.0, 8.0, 1.0]])).round(3)
    array([-0.8])
    """
    return np.einsum("rp,rp->r", unit_ranks(x_RP), unit_ranks(y_RP))


def unit_ranks(x_RP: np.ndarray) -> np.ndarray:
    """Average ranks of each row, centred and of length 1, so that a product of two rows is Spearman's rho."""
    from scipy.stats import rankdata  # a second to import, and every start of snakemake imports this module

    rank_RP = rankdata(x_RP, axis=1) - (x_RP.shape[1] + 1) / 2
    length_R1 = np.sqrt((rank_RP**2).sum(1, keepdims=True))
    return np.divide(rank_RP, length_R1, out=np.full(rank_RP.shape, np.nan), where=length_R1 > 0)


def kendall(x_RP: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row: (concordant - discordant pairs) / sqrt(pairs untied in x x pairs untied in y).

    >>> round(float(kendall(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[9.0, 7.0, 8.0, 8.0]]))[0]), 3)
    -0.183
    """
    return np.einsum("rk,rk->r", unit_signs(x_RP), unit_signs(y_RP))


def unit_signs(x_RP: np.ndarray) -> np.ndarray:
    """Signs of the differences of all pairs of each row, of length 1: a product of two rows is Kendall's tau-b."""
    first, second = np.triu_indices(x_RP.shape[1], 1)
    sign_RK = np.sign(x_RP[:, first] - x_RP[:, second]).astype(np.float32)
    length_R1 = np.sqrt(np.square(sign_RK).sum(1, keepdims=True))
    return np.divide(sign_RK, length_R1, out=np.full(sign_RK.shape, np.nan, np.float32), where=length_R1 > 0)


def spearman_within(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]) -> float:
    """Mean of the strata's rank correlations, (1/S) sum_s rho_s: differences between budgets cannot fake one.

    Here bytes drive both, so pooling the plans says -0.54, while inside each budget the relation is reversed:

    >>> proxy, gold = [[1.0, 1.1, 1.2], [2.0, 2.1, 2.2]], [[0.80, 0.81, 0.82], [0.50, 0.51, 0.52]]
    >>> round(float(spearman(np.ravel(proxy)[None], np.ravel(gold)[None])[0]), 2)
    -0.54
    >>> round(spearman_within(proxy, gold), 2)
    1.0
    """
    rho = [spearman(np.asarray(x)[None], np.asarray(y)[None])[0] for x, y in zip(proxy, gold, strict=True)]
    return float(np.mean(rho))


def rho_half_width(plans: int) -> float:
    """Half of the 95 % interval of Spearman's rho at 0: tanh(1.96 sqrt(1.06 / (P - 3))) (Fieller et al. 1957).

    >>> round(rho_half_width(60), 2), round(rho_half_width(28), 2)
    (0.26, 0.38)
    """
    return float(np.tanh(1.96 * np.sqrt(1.06 / (plans - 3)))) if plans > 3 else np.nan


def reliability(values_PI: np.ndarray, half_FI: np.ndarray) -> float:
    """2 r / (1 + r), r the mean over folds of rho between the plans' means on the two halves of the items.

    What a repetition with other items would agree with this one (Spearman 1910, Brown 1910): no proxy can be
    expected to correlate with a gold by more than its root.

    >>> rng, halves = np.random.default_rng(0), np.arange(400) % 2 == np.array([[0], [1]])
    >>> same = rng.random((30, 400)) < 0.5
    >>> better = rng.random((30, 400)) < np.linspace(0.2, 0.8, 30)[:, None]
    >>> round(reliability(same.astype(float), halves), 1), round(reliability(better.astype(float), halves), 1)
    (0.1, 1.0)
    """
    halves = (half_FI.astype(float), (~half_FI).astype(float))
    first_FP, second_FP = (half @ values_PI.T / half.sum(1, keepdims=True) for half in halves)
    r_F = spearman(first_FP, second_FP)
    r = float(np.nanmean(r_F)) if np.isfinite(r_F).any() else np.nan
    r = max(r, 0.0)  # halves that contradict each other agree in nothing
    return 2 * r / (1 + r)
