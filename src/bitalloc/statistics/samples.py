"""Responses of plans to the same items, and how items are resampled and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

MIN_CLUSTERS = 10  # a bootstrap over fewer is far too narrow
ACCURACIES = ("acc", "exact_match,strict-match", "acc_norm,none", "acc,none")  # the first that a task has counts


@dataclass(frozen=True)
class Scores:
    """Responses of plans to items; NaN where a plan was not asked."""

    plans: tuple[str, ...]
    values_PI: np.ndarray
    weight_I: np.ndarray
    group_I: np.ndarray  # cluster of each item, as an integer

    def of(self, plans: Sequence[str]) -> np.ndarray:
        return self.values_PI[[self.plans.index(plan) for plan in plans]]

    def means(self, plans: Sequence[str]) -> np.ndarray:
        return np.average(self.of(plans), axis=1, weights=self.weight_I)

    def resampled(self, plans: Sequence[str], counts_RI: np.ndarray) -> np.ndarray:
        """Means of the plans in every resample, which takes item i `counts_RI[r, i]` times."""
        weights_RI = counts_RI * self.weight_I
        return weights_RI @ self.of(plans).T / weights_RI.sum(1, keepdims=True)

    def shared(self, plans: Sequence[str]) -> Scores:
        """The items that all of `plans` were asked."""
        asked_I = np.isfinite(self.of(plans)).all(0)
        if asked_I.all():
            return self
        return Scores(self.plans, self.values_PI[:, asked_I], self.weight_I[asked_I], self.group_I[asked_I])


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


def resample(
    group_I: np.ndarray, resamples: int, rng: np.random.Generator, dtype: type[np.integer] = np.int64
) -> np.ndarray:
    """How often each bootstrap resample takes each item, counts_RI.

    Whole clusters are drawn where there are at least `MIN_CLUSTERS`, otherwise items within each cluster.
    """
    names, code_I = np.unique(group_I, return_inverse=True)
    if len(names) >= MIN_CLUSTERS:
        return _drawn(len(names), resamples, rng, dtype)[:, code_I]
    counts_RI = np.zeros((resamples, len(code_I)), dtype=dtype)
    for group in range(len(names)):
        members = np.flatnonzero(code_I == group)
        counts_RI[:, members] = _drawn(len(members), resamples, rng, dtype)
    return counts_RI


def units_drawn(group_I: np.ndarray) -> int:
    """How many units `resample` draws: clusters, or items where there are too few of them."""
    clusters = len(np.unique(group_I))
    return clusters if clusters >= MIN_CLUSTERS else len(group_I)


def _drawn(units: int, resamples: int, rng: np.random.Generator, dtype: type[np.integer]) -> np.ndarray:
    """Counts of `units` draws with replacement, in turns: numpy's are of eight bytes, whatever is kept."""
    even = np.full(units, 1 / units)
    parts = [rng.multinomial(units, even, size=min(256, resamples - r)) for r in range(0, resamples, 256)]
    return np.concatenate([part.astype(dtype) for part in parts])


def split_items(group_I: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Random halves: half_FI is True for fold A.

    Whole clusters go to one side where there are at least `MIN_CLUSTERS`: items of a subject have in common what a
    plan does to that subject, and a choice made on some of them is not checked by the others. Fewer clusters are each
    halved, to within one item.
    """
    names, code_I = np.unique(group_I, return_inverse=True)
    if len(names) >= MIN_CLUSTERS:
        return split_items(np.zeros(len(names)), folds, rng)[:, code_I]
    half_FI = np.zeros((folds, len(group_I)), dtype=bool)
    for fold in range(folds):
        shuffled = rng.permutation(len(group_I))
        by_group = shuffled[np.argsort(group_I[shuffled], kind="stable")]
        half_FI[fold, by_group[rng.integers(2) :: 2]] = True
    return half_FI
