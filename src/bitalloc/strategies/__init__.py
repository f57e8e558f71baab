"""Strategies: (instance, budget in bytes, seed) -> one option for each matrix. Never over the budget."""

from __future__ import annotations

from typing import Protocol

from bitalloc.errors import BitallocError, nearest
from bitalloc.strategies import evolve, greedy, manual, optimal, random, uniform
from bitalloc.strategies.apart import around
from bitalloc.strategies.instance import Choice, Instance


class Strategy(Protocol):
    """Returns `choice_N`, an option index for each matrix, of at most `budget` bytes and the same for equal arguments.

    Raises `BitallocError` with the reachable range when nothing fits.
    """

    def __call__(self, instance: Instance, budget: int, *, seed: int = 0) -> Choice: ...


STRATEGIES: dict[str, Strategy] = {
    "uniform": around(uniform.uniform),
    "optimal": optimal.optimal,
    "bits_only": optimal.bits_only,
    "rank_only": around(optimal.rank_only),
    "manual": around(manual.manual),
    "greedy": greedy.greedy,
    "evolve": evolve.evolve,
    "random": random.random,
}


def strategy(name: str) -> Strategy:
    """The strategy of that name; raises `BitallocError` with the nearest valid name."""
    if name not in STRATEGIES:
        raise BitallocError(f"unknown strategy {name!r}: {nearest(name, STRATEGIES)}")
    return STRATEGIES[name]


__all__ = ["STRATEGIES", "Choice", "Instance", "Strategy", "strategy"]
