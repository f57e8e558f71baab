"""The exact allocation, with a certificate: Lagrangian bound plus dynamic programming over a core.

With a price p on bytes, the reduced cost of option k of matrix i is
    r_ik = c_ik + p b_ik - min_l (c_il + p b_il) >= 0,
and for every plan within the budget B
    sum c = L(p) + sum r + p (B - sum b),    L(p) = sum_i min_l (c_il + p b_il) - p B.
So L(p) bounds every plan from below (it is the linear relaxation at the best price), and an option whose reduced
cost exceeds the distance between L(p) and the best plan known is in no better plan. What is left, the core, is
searched by dynamic programming over Pareto lists of (bytes, cost): D. Pisinger, A minimal algorithm for the
multiple-choice knapsack problem, European Journal of Operational Research 83 (1995). When a list grows
beyond what the effort allows, it loses the states of the largest bound; the certificate then rests on the smallest
bound lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitalloc.strategies.greedy import fill
from bitalloc.strategies.instance import Choice, Instance
from bitalloc.strategies.uniform import uniform

_EXACT = 1e-12  # of the objective: differences below it are rounding


@dataclass(frozen=True, eq=False)
class Solution:
    """A plan, its objective, and a bound that no plan within the budget goes below (equal: proven optimal)."""

    choice_N: Choice
    objective: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """objective / lower_bound - 1."""
        return gap(self.objective, self.lower_bound)


def gap(objective: float, lower_bound: float) -> float:
    """objective / lower_bound - 1; infinite above a bound of nought.

    >>> gap(1.1, 1.0) > 0.09, gap(0.0, 0.0), gap(1.0, 0.0)
    (True, 0.0, inf)
    """
    if objective <= lower_bound:
        return 0.0
    return objective / lower_bound - 1 if lower_bound > 0 else float("inf")


def optimal(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
    """The plan of least cost within the budget; among equals the one of fewer bytes."""
    return solve(instance, budget).choice_N


def bits_only(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
    """The optimum without low-rank parts: the control that tells what rank is worth."""
    return optimal(instance.restricted(np.array([option.rank == 0 for option in instance.options])), budget)


def rank_only(instance: Instance, budget: int, *, seed: int = 0) -> Choice:
    """The optimum with quantiser, bits and group size as in the uniform plan, rank free."""
    same = instance.options[uniform(instance, budget)[0]]
    place = (same.quantizer, same.bits, same.group_size)
    return optimal(
        instance.restricted(np.array([(o.quantizer, o.bits, o.group_size) == place for o in instance.options])), budget
    )


def solve(instance: Instance, budget: int, *, effort: int = 8_000_000) -> Solution:
    """The plan of least cost within `budget` bytes; raises `BitallocError` when none fits.

    `effort` caps the states looked at (about 0.1 us each); only costs nearly proportional to bytes come near it.
    """
    instance.require(budget)
    costs_NK = instance.efficient_NK
    price, base_N = _relax(instance, costs_NK, budget)
    free = budget - instance.size(base_N)
    core = _Core(
        added_NK=instance.nbytes_NK - instance.at(instance.nbytes_NK, base_N)[:, None],
        extra_NK=costs_NK - instance.at(costs_NK, base_N)[:, None],
        price=price,
        free=free,
        rounding=_EXACT * instance.objective(base_N),
    )
    filled_N = fill(instance, base_N, budget)
    distance = instance.objective(filled_N) - instance.objective(base_N) + price * free
    found_N, lost = core.search(base_N, distance, effort)
    choice_N = min(found_N, filled_N, key=lambda c_N: (instance.objective(c_N), instance.size(c_N)))
    objective = instance.objective(choice_N)
    bound = instance.objective(base_N) - price * free
    return Solution(choice_N, objective, min(objective, bound + lost))


def _relax(instance: Instance, costs_NK: NDArray[np.float64], budget: int) -> tuple[float, Choice]:
    """The least price on bytes at which the cheapest plan fits, and that plan: the linear relaxation, rounded down."""

    def cheapest(price: float) -> Choice:
        return (costs_NK + price * instance.nbytes_NK).argmin(axis=1)

    if instance.size(cheapest(0.0)) <= budget:
        return 0.0, cheapest(0.0)
    # at twice the largest cost for a single byte nothing but the smallest options pays
    low, high = 0.0, 2 * float(costs_NK[np.isfinite(costs_NK)].max())
    while low < (middle := (low + high) / 2) < high:
        if instance.size(cheapest(middle)) > budget:
            low = middle
        else:
            high = middle
    return high, cheapest(high)


@dataclass(frozen=True, eq=False)
class _Core:
    """Deviations from the relaxed plan: bytes added and cost added by each option, 0 for the plan's own."""

    added_NK: NDArray[np.int64]
    extra_NK: NDArray[np.float64]
    price: float
    free: int
    rounding: float

    def search(self, base_N: Choice, distance: float, effort: int) -> tuple[Choice, float]:
        """The best plan found whose cost is within `distance` of the bound, and the least bound that was lost."""
        reduced_NK = self.extra_NK + self.price * self.added_NK
        reduced_NK[np.arange(len(base_N)), base_N] = 0.0
        others_NK = reduced_NK.copy()
        others_NK[np.arange(len(base_N)), base_N] = np.inf
        nearest_N = others_NK.min(axis=1)
        order = np.argsort(nearest_N, kind="stable")
        added_S, extra_S = np.zeros(1, np.int64), np.zeros(1)
        trail: list[tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]] = []
        lost = np.inf
        released = np.append(np.where(reduced_NK <= distance + self.rounding, self.added_NK, 0).min(axis=1)[order], 0)
        released = released[::-1].cumsum()[::-1]  # bytes that later matrices may still give back
        for step, i in enumerate(order):
            within = distance + self.rounding
            if nearest_N[i] > within or not len(added_S):
                break
            options = np.flatnonzero(reduced_NK[i] <= within)
            effort -= len(options) * len(added_S)
            added = (self.added_NK[i, options, None] + added_S).ravel()
            extra = (self.extra_NK[i, options, None] + extra_S).ravel()
            kept = np.flatnonzero((extra + self.price * added <= within) & (added + released[step + 1] <= self.free))
            kept = kept[np.argsort(added[kept], kind="stable")]
            kept = kept[_pareto(added[kept], extra[kept])]
            ahead = order[step + 1 :]
            width = max(100, effort // max(1, np.count_nonzero(reduced_NK[ahead] <= within)))
            if len(kept) > width:
                bound = extra[kept] + self.price * added[kept]
                by_bound = np.argsort(bound, kind="stable")
                lost = min(lost, float(bound[by_bound[width]]))
                kept = kept[np.sort(by_bound[:width])]
            which, parent = np.divmod(kept, len(added_S))
            trail.append((int(i), options, which.astype(np.int32), parent.astype(np.int32)))
            added_S, extra_S = added[kept], extra[kept]
            if fitting := int(np.searchsorted(added_S, self.free, side="right")):
                distance = min(distance, float(extra_S[fitting - 1]) + self.price * self.free)
        choice_N = base_N.copy()
        state = int(np.searchsorted(added_S, self.free, side="right")) - 1
        if state < 0:  # everything within the budget was lost
            return choice_N, lost
        for i, options, which, parent in reversed(trail):
            choice_N[i] = options[which[state]]
            state = int(parent[state])
        return choice_N, lost


def _pareto(added: NDArray[np.int64], extra: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which states (by rising bytes) cost less than all smaller ones; of equal bytes the cheapest, of equals the first.

    >>> _pareto(np.array([0, 1, 1, 2, 3]), np.array([5.0, 4.0, 3.0, 3.0, 1.0]))
    array([ True, False,  True, False,  True])
    """
    lower = np.ones(len(extra), dtype=bool)
    lower[1:] = extra[1:] < np.minimum.accumulate(extra)[:-1]
    kept = np.flatnonzero(lower)
    beaten = kept[:-1][added[kept][:-1] == added[kept][1:]]
    lower[beaten] = False
    return lower
