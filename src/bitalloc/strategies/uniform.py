"""Uniform: one option for all matrices, the opponent that every allocation has to beat."""

from __future__ import annotations

import numpy as np

from bitalloc.errors import BitallocError
from bitalloc.strategies.instance import Choice, Instance


def uniform(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
    """Of the options that fit when all matrices take them, the one of least total cost.

    Raises `BitallocError` when the options that every matrix offers are all too large.
    """
    instance.require(budget)
    nbytes_K, costs_K = instance.nbytes_NK.sum(axis=0), instance.costs_NK.sum(axis=0)
    fits = [k for k in range(len(instance.options)) if nbytes_K[k] <= budget and np.isfinite(costs_K[k])]
    if not fits:
        raise BitallocError(f"no option that every matrix offers fits {budget:,} bytes; {instance.reach()}")
    best = min(fits, key=lambda k: (costs_K[k], nbytes_K[k], k))
    return np.full(len(instance.layers), best, dtype=np.int64)
