"""Component: plans that harm one component of the model and leave the rest alone, in steps of growing damage.

They are no allocations: at no budget, and no rivals of the others. Pairs of them that lose equally much perplexity in
different components are what tells whether it matters where a loss lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitalloc.option import PASS_THROUGH
from bitalloc.strategies.instance import Choice, Instance

STEPS = 6  # at most, for each component


def components(instance: Instance, component_N: Sequence[str], steps: int = STEPS) -> Iterator[tuple[str, Choice]]:
    """(component, plan) in the order of the matrices, then by rising cost; none where there is but one component.

    All matrices of the component take one option, all others their cheapest. Of the options the ones nearest to
    `steps` costs are taken that are spaced evenly (in logarithms) over what all components reach, so that the losses of
    one are found in the others too; over the component's own range where nothing is reached by all.
    """
    component_N = np.asarray(component_N)
    ladders = {name: _ladder(instance, component_N == name) for name in dict.fromkeys(component_N.tolist())}
    ladders = {name: ladder for name, ladder in ladders.items() if len(ladder[0])}
    if len(ladders) < 2:
        return
    shared = max(cost_L[0] for cost_L, _ in ladders.values()), min(cost_L[-1] for cost_L, _ in ladders.values())
    mildest_N = instance.costs_NK.argmin(axis=1)
    for name, (cost_L, option_L) in ladders.items():
        low, high = shared if shared[0] < shared[1] else (cost_L[0], cost_L[-1])
        wanted = np.geomspace(low, high, steps)
        nearest = np.abs(np.log(cost_L) - np.log(wanted)[:, None]).argmin(axis=1)
        for place in np.unique(nearest):
            yield name, np.where(component_N == name, option_L[place], mildest_N)


def _ladder(instance: Instance, member_N: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What the options cost that all members offer, 16 bits apart, by rising cost, and which they are."""
    cost_K = instance.costs_NK[member_N].sum(axis=0)
    option_L = np.argsort(cost_K, kind="stable")
    harms_K = np.array([option.quantizer != PASS_THROUGH for option in instance.options])
    option_L = option_L[harms_K[option_L] & np.isfinite(cost_K[option_L]) & (cost_K[option_L] > 0)]
    return cost_K[option_L], option_L
