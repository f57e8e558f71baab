"""Random: plans that fill the budget and are otherwise arbitrary, the background against which others stand out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitalloc.strategies.instance import Choice, Instance


def random(instance: Instance, budget: int, *, seed: int | Sequence[int] = 0, slack: float = 0.01) -> Choice:
    """A seeded plan that takes between (1 - slack) and 1 times the budget; the fullest one found if none does.

    Each plan draws a taste for every option, shared by all matrices, so that plans stay different from one another
    when there are many matrices; options are drawn by taste and by a price on bytes under which the expected size
    meets the budget; random changes of single matrices then bring the size into the window.
    """
    instance.require(budget)
    rng = np.random.default_rng(seed)
    least = (1 - slack) * budget
    taste_NK = np.where(np.isfinite(instance.costs_NK), rng.normal(size=len(instance.options)), -np.inf)
    share_NK = _shares(instance, taste_NK, budget * (1 - slack / 2))
    choice_N = (rng.random(len(instance.layers))[:, None] > share_NK.cumsum(axis=1)[:, :-1]).sum(axis=1)
    # rounding of the cumulated shares must not pick what is not offered
    choice_N = np.where(np.isfinite(instance.at(instance.costs_NK, choice_N)), choice_N, instance.smallest())
    size = instance.size(choice_N)
    while size > budget or size < least:
        added_NK = instance.nbytes_NK - instance.at(instance.nbytes_NK, choice_N)[:, None]
        useful_NK = (added_NK < 0) if size > budget else (added_NK > 0) & (size + added_NK <= budget)
        useful_NK &= np.isfinite(instance.costs_NK)
        in_window_NK = useful_NK & (size + added_NK <= budget) & (size + added_NK >= least)
        moves = np.argwhere(in_window_NK if in_window_NK.any() else useful_NK)
        if not len(moves):
            break
        i, k = moves[rng.integers(len(moves))]
        choice_N[i] = k
        size += int(added_NK[i, k])
    return choice_N


def _shares(instance: Instance, taste_NK: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """[N, K] probabilities ~ exp(taste - price x bytes), the price such that the expected bytes meet the target."""
    scaled_NK = instance.nbytes_NK / instance.nbytes_NK.mean()

    def shares(price: float) -> NDArray[np.float64]:
        logit_NK = taste_NK - price * scaled_NK
        share_NK = np.exp(logit_NK - logit_NK.max(axis=1, keepdims=True))
        return share_NK / share_NK.sum(axis=1, keepdims=True)

    low, high = -1e3, 1e3
    for _ in range(50):
        middle = (low + high) / 2
        if (shares(middle) * instance.nbytes_NK).sum() > target:
            low = middle
        else:
            high = middle
    return shares(high)
