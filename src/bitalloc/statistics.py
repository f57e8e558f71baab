"""The statistics of the analysis, each with its formula.

Shapes: P plans, I items (or windows), R bootstrap resamples, F folds. Intervals are 95 %.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binom, rankdata

MIN_CLUSTERS = 10  # a bootstrap over fewer is far too narrow
Z = 1.959964
ACCURACIES = ("acc", "exact_match,strict-match", "acc_norm,none", "acc,none")  # the first that a task has counts


@dataclass(frozen=True)
class Scores:
    """Responses of the same items by several plans."""

    plans: tuple[str, ...]
    values_PI: np.ndarray
    weight_I: np.ndarray
    group_I: np.ndarray  # cluster of each item, as an integer

    def of(self, plan: str) -> np.ndarray:
        return self.values_PI[self.plans.index(plan)]

    def means(self, plans: Sequence[str]) -> np.ndarray:
        return np.average([self.of(plan) for plan in plans], axis=1, weights=self.weight_I)

    def resampled(self, plans: Sequence[str], counts_RI: np.ndarray) -> np.ndarray:
        """Means of the plans in every resample, which takes item i `counts_RI[r, i]` times."""
        weights_RI = counts_RI * self.weight_I
        return weights_RI @ np.stack([self.of(plan) for plan in plans]).T / weights_RI.sum(1, keepdims=True)


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of EVALUATE or RESPONSES that hold the accuracy of a task, one metric each, under the name `acc`.

    A task of lm-eval in parts (mmlu_anatomy and others beside mmlu) counts as a whole.

    >>> rows = [("piqa", "acc_norm,none"), ("piqa", "acc,none"), ("mmlu", "acc,none"), ("mmlu_anatomy", "acc,none")]
    >>> accuracies(pd.DataFrame(rows, columns=["task", "metric"]).assign(suite="downstream"))["task"].tolist()
    ['piqa', 'mmlu']
    """
    rows = frame[frame["metric"].isin(ACCURACIES)]
    rank = rows["metric"].map(ACCURACIES.index)
    best = rank.groupby(rows["task"]).transform("min")
    tasks = set(rows.loc[rows["suite"] == "downstream", "task"])
    parts = {task for task in tasks if any(task.startswith(f"{whole}_") for whole in tasks)}
    return rows[(rank == best) & ~rows["task"].isin(parts)].assign(metric="acc")


def resample(group_I: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each bootstrap resample takes each item, counts_RI.

    Whole clusters are drawn where there are at least `MIN_CLUSTERS`, otherwise items within each cluster.
    """
    names, code_I = np.unique(group_I, return_inverse=True)
    if len(names) >= MIN_CLUSTERS:
        return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, code_I]
    counts_RI = np.zeros((resamples, len(code_I)), dtype=np.int64)
    for group in range(len(names)):
        members = np.flatnonzero(code_I == group)
        counts_RI[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    return counts_RI


def spearman(x_RP: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row: Pearson's of the average ranks; NaN where a row is constant.

    >>> spearman(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[9.0, 7.0, 8.0, 1.0]])).round(3)
    array([-0.8])
    """
    a_RP, b_RP = (rankdata(each, axis=1) - (each.shape[1] + 1) / 2 for each in (x_RP, y_RP))
    scale_R = np.sqrt((a_RP**2).sum(1) * (b_RP**2).sum(1))
    return np.divide((a_RP * b_RP).sum(1), scale_R, out=np.full(len(a_RP), np.nan), where=scale_R > 0)


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


def fisher_interval(rho: float, rho_R: np.ndarray) -> tuple[float, float]:
    """tanh(artanh(rho) +- 1.96 s), s the deviation of artanh over the bootstrap.

    Resampling the items adds their noise a second time and pulls the resampled rho towards 0, so percentiles
    of rho_R would be off centre; their spread is what is used. In simulations it covers 97-99 %.
    """
    if not np.isfinite(rho) or np.isfinite(rho_R).sum() < 2:
        return np.nan, np.nan
    edge = 1 - 1e-3
    spread = np.arctanh(np.clip(rho_R[np.isfinite(rho_R)], -edge, edge)).std()
    centre = np.arctanh(np.clip(rho, -edge, edge))
    return float(np.tanh(centre - Z * spread)), float(np.tanh(centre + Z * spread))


def mcnemar_p(only_a: np.ndarray | int, only_b: np.ndarray | int) -> np.ndarray:
    """Exact two-sided McNemar test: p = min(1, 2 P(X <= min(a, b))), X ~ Binomial(a + b, 1/2).

    a, b = items that only one of the two plans gets right (McNemar 1947; exact form).

    >>> from scipy.stats import binomtest
    >>> abs(float(mcnemar_p(3, 14)) - float(binomtest(3, 17).pvalue)) < 1e-12, float(mcnemar_p(0, 0))
    (True, 1.0)
    """
    return np.minimum(1.0, 2 * binom.cdf(np.minimum(only_a, only_b), np.add(only_a, only_b), 0.5))


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


def split_items(group_I: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Random halves: half_FI is True for fold A; every cluster is halved, to within one item."""
    half_FI = np.zeros((folds, len(group_I)), dtype=bool)
    for fold in range(folds):
        shuffled = rng.permutation(len(group_I))
        by_group = shuffled[np.argsort(group_I[shuffled], kind="stable")]
        half_FI[fold, by_group[rng.integers(2) :: 2]] = True
    return half_FI


def cross_fitted_regret(gold_PI: np.ndarray, pick_P: np.ndarray, half_FI: np.ndarray) -> np.ndarray:
    """Contribution of each item to the regret of a choice, in points: their mean is the regret.

    100 mean over F of (gold[j_A, i in B] - gold[pick, i in B]) and A, B swapped; j_A is the plan that is best on
    fold A. Choosing on one fold and scoring on the other removes the optimism of the maximum: over plans that
    are truly equal the naive max - pick is positive, this is 0 on average. The rival is chosen on half of the
    items, so the regret is a lower bound, and below 0 where the proxy chooses better than they do. `pick_P`
    may spread its weight over plans (a random pick is 1/P each).

    Two plans; the pick is the worse one, by 50 points, on every half:

    >>> gold_PI = np.array([[1, 1, 1, 1], [1, 0, 1, 0]])
    >>> halves = np.array([[True, True, False, False]])
    >>> float(cross_fitted_regret(gold_PI, np.array([0, 1]), halves).mean())
    50.0
    """
    chosen_I = pick_P @ gold_PI
    regret_I = np.zeros(gold_PI.shape[1])
    for half_I in itertools.chain(half_FI, ~half_FI):
        best = np.argmax(gold_PI[:, half_I].mean(1))
        regret_I += np.where(half_I, 0.0, gold_PI[best] - chosen_I)
    return 100 * regret_I / len(half_FI)


def naive_regret(gold_PI: np.ndarray, pick_P: np.ndarray) -> float:
    """100 (max_P mean - mean of the pick), chosen and scored on the same items: biased upwards."""
    mean_P = gold_PI.mean(1)
    return float(100 * (mean_P.max() - pick_P @ mean_P))


def detectable_points(discordant: float, n: int) -> float:
    """Smallest paired difference found with 80 % power at the 5 % level: 100 x 2.8 sqrt(q / n) points.

    q = share of items on which two plans differ; independent items assumed.

    >>> round(detectable_points(0.10, 1319), 1)
    2.4
    """
    return 100 * 2.8 * float(np.sqrt(discordant / n))
