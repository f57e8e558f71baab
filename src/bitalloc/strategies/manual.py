"""Manual: what a practitioner does by hand, two levels handed out by sensitivity."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bitalloc.strategies.instance import Choice, Instance


def manual(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
    """Sensitive matrices get one bit-width more and the highest rank, the others the lowest rank.

    A matrix's sensitivity is its cost at the lower level; the most sensitive ones for each byte of the step move
    up until the budget is full. Tried for every pair of neighbouring bit-widths (2 and 3 bits, 3 and 4, ...) at
    every group size; the pair of least total cost is kept.
    """
    instance.require(budget)
    coded = [option for option in instance.options if option.group_size]
    widths = sorted({option.bits for option in coded})
    plans = [instance.smallest()]
    for quantizer, group_size in sorted({(option.quantizer, option.group_size) for option in coded}):
        for low, high in list(pairwise(widths)) or [(width, width) for width in widths]:
            levels = []
            for bits, highest in ((low, False), (high, True)):
                place = (quantizer, group_size, bits)
                allowed_K = np.array([(o.quantizer, o.group_size, o.bits) == place for o in instance.options])
                levels.append(_level(instance, allowed_K, highest=highest))
            if (plan := _two_levels(instance, budget, *levels)) is not None:
                plans.append(plan)
    return min(plans, key=instance.objective)


def _level(instance: Instance, allowed_K: NDArray[np.bool_], *, highest: bool) -> Choice | None:
    """Every matrix at its lowest or highest rank among the allowed options; None when one offers none of them."""
    offered_NK = np.isfinite(instance.costs_NK) & allowed_K
    if not offered_NK.any(axis=1).all():
        return None
    rank_K = np.array([option.rank for option in instance.options])
    if highest:
        return np.where(offered_NK, rank_K, -1).argmax(axis=1)
    return np.where(offered_NK, rank_K, np.iinfo(np.int64).max).argmin(axis=1)


def _two_levels(instance: Instance, budget: int, low_N: Choice | None, high_N: Choice | None) -> Choice | None:
    """Everything low, then up in the order of sensitivity for each byte; what no longer fits stays low."""
    if low_N is None or high_N is None or (free := budget - instance.size(low_N)) < 0:
        return None
    step_N = instance.at(instance.nbytes_NK, high_N) - instance.at(instance.nbytes_NK, low_N)
    choice_N = low_N.copy()
    for i in np.argsort(-instance.at(instance.costs_NK, low_N) / np.maximum(step_N, 1), kind="stable"):
        if step_N[i] <= free:
            choice_N[i] = high_N[i]
            free -= int(step_N[i])
    return choice_N
