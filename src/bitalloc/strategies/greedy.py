"""Greedy: always the change that saves the most nats for each byte, until nothing fits."""

from __future__ import annotations

import numpy as np

from bitalloc.strategies.instance import Choice, Instance


def fill(instance: Instance, choice_N: Choice, budget: int) -> Choice:
    """Improve a plan within the budget, one matrix at a time, by the steepest fall of cost for each byte added."""
    choice_N = choice_N.copy()
    costs_NK, nbytes_NK = instance.efficient_NK, instance.nbytes_NK
    free = budget - instance.size(choice_N)
    saved_NK = instance.at(instance.costs_NK, choice_N)[:, None] - costs_NK
    added_NK = nbytes_NK - instance.at(nbytes_NK, choice_N)[:, None]
    while True:
        # a gain that costs no bytes comes before all others
        slope_NK = np.where((saved_NK > 0) & (added_NK <= free), saved_NK / np.maximum(added_NK, 1e-9), 0.0)
        i, k = divmod(int(slope_NK.argmax()), len(instance.options))
        if slope_NK[i, k] <= 0:
            return choice_N
        choice_N[i] = k
        free -= int(added_NK[i, k])
        saved_NK[i] = costs_NK[i, k] - costs_NK[i]
        added_NK[i] = nbytes_NK[i] - nbytes_NK[i, k]


def greedy(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
    """From the smallest plan upwards. Within a few per cent of the optimum, without a certificate."""
    instance.require(budget)
    return fill(instance, instance.smallest(), budget)
