"""Rules for all matrices, where an embedding or a head has options of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import product

import numpy as np

from bitalloc.errors import BitallocError
from bitalloc.strategies.instance import Choice, Instance

Rule = Callable[..., Choice]


def around(rule: Rule) -> Rule:
    """`rule` for the matrices, and for what stands apart the options with which the whole costs least.

    There are one or two such tables with a few options each: all combinations are tried, each leaving the rule the
    rest of the budget. Raises what the rule raises when it fits beside none of them.
    """

    @wraps(rule)
    def call(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
        apart = np.flatnonzero(instance.apart_N)
        if not len(apart):
            return rule(instance, budget, seed=seed)
        inner, plans, refused = instance.without_apart(), [], None
        for options in product(*(np.flatnonzero(np.isfinite(instance.costs_NK[i])) for i in apart)):
            choice_N = np.zeros(len(instance.layers), dtype=np.int64)
            choice_N[apart] = options
            left = budget - int(instance.nbytes_NK[apart, options].sum())
            try:
                choice_N[~instance.apart_N] = rule(inner, left, seed=seed)
            except BitallocError as error:
                refused = error
            else:
                plans.append(choice_N)
        if not plans:
            instance.require(budget)
            raise refused or BitallocError(f"nothing fits {budget:,} bytes; {instance.reach()}")
        return min(plans, key=lambda plan_N: (instance.objective(plan_N), instance.size(plan_N)))

    return call
