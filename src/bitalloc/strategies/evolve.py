"""Evolve: the evolutionary search of `bitalloc.search` on the additive costs, a baseline for the exact optimum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitalloc.search import Genome, Space
from bitalloc.search import evolve as generations
from bitalloc.strategies.instance import Choice, Instance

EVALUATIONS = 480  # plans that are costed
OFFSPRING, SWITCHES = 4, 1  # the best of nine on other instances than those reported (make bench-allocators)


def evolve(
    instance: Instance,
    budget: int,
    *,
    seed: int = 0,
    evaluations: int = EVALUATIONS,
    offspring: int = OFFSPRING,
    switches: int = SWITCHES,
    start_N: Choice | None = None,
) -> Choice:
    """The best of `evaluations` plans, bred from `start_N`, else from one raised at random until nothing more fits.

    Levels of a matrix are its efficient options; an option of the start that is none becomes the largest below it.
    """
    instance.require(budget)
    offered = levels(instance)
    space = Space([instance.nbytes_NK[i, options] for i, options in enumerate(offered)], budget)
    if start_N is None:
        first_N = space.fill(np.zeros(len(offered), dtype=np.int64), np.random.default_rng([seed, 0]))
    else:
        first_N = nearest(instance, offered, start_N)
    level_NL = np.zeros((len(offered), space.top_G.max() + 1), dtype=np.int64)
    for row_L, options in zip(level_NL, offered, strict=True):
        row_L[: len(options)] = options

    def choice(level_N: Genome) -> Choice:
        return level_NL[space.genes, level_N]

    def score(genomes: Sequence[Genome], _: int) -> list[float]:
        return [-instance.objective(choice(level_N)) for level_N in genomes]

    run = generations(
        space,
        first_N,
        score,
        generations=(evaluations - 1) // offspring,
        offspring=offspring,
        switches=switches,
        seed=seed,
    )
    *_, last = run
    return choice(last.champion_G)


def levels(instance: Instance) -> list[np.ndarray]:
    """Of each matrix its efficient options by rising bytes."""
    order_NK = instance.nbytes_NK.argsort(axis=1, kind="stable")
    return [order_K[np.isfinite(instance.efficient_NK[i, order_K])] for i, order_K in enumerate(order_NK)]


def nearest(instance: Instance, offered: Sequence[np.ndarray], choice_N: Choice) -> Genome:
    """The genome of a plan: of each matrix the largest level that takes no more bytes than its option."""
    sizes_N = instance.at(instance.nbytes_NK, choice_N)
    place_N = [
        np.searchsorted(instance.nbytes_NK[i, options], size, side="right") - 1
        for i, (options, size) in enumerate(zip(offered, sizes_N, strict=True))
    ]
    return np.array(place_N, dtype=np.int64)
