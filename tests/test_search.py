"""The evolutionary search: budgets kept, small neighbourhoods left, stages, seeds, the optimum of small spaces."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc.errors import BitallocError
from bitalloc.search import Generation, Space, evolve

SIZES = [[4, 8, 16], [2, 4, 8], [30, 60, 120], [7], [1, 2]]


def rugged(seed: int = 0):
    """A fitness in which genes interact; every level is worth something, so that full plans are the best."""
    rng = np.random.default_rng(seed)
    own, pairs = rng.uniform(1, 2, size=5), rng.uniform(0, 0.5, size=(5, 5, 3, 3))

    def fitness(level_G: np.ndarray) -> float:
        together = sum(pairs[g, h, level_G[g], level_G[h]] for g in range(5) for h in range(g))
        return float(np.sqrt(level_G * own).sum() + 0.2 * together)

    return fitness


def plain(fitness):
    return lambda genomes, _stage: [fitness(level_G) for level_G in genomes]


def search(space: Space, fitness, **how) -> list[Generation]:
    settings = {"generations": 60, "offspring": 6, "seed": 0} | how
    return list(evolve(space, space.top_G * 0, plain(fitness), **settings))


@pytest.mark.parametrize("budget", [None, 70, 100])
@pytest.mark.parametrize("seed", range(4))
def test_reaches_the_exhaustive_optimum_of_a_small_space(budget: int | None, seed: int) -> None:
    space, fitness = Space(SIZES, budget), rugged(seed)
    legal = (np.array(levels) for levels in product(*(range(len(sizes)) for sizes in SIZES)))
    fitting = [level_G for level_G in legal if budget is None or space.size(level_G) <= budget]
    assert len(fitting) > 10
    told = search(space, fitness, seed=seed)
    assert told[-1].fitness == max(map(fitness, fitting)) > told[0].fitness


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), budget=st.integers(44, 220), switches=st.integers(1, 4))
def test_children_keep_the_budget_and_are_new_and_mutants_leave_no_room(seed: int, budget: int, switches: int) -> None:
    space, rng = Space(SIZES, budget), np.random.default_rng(seed)
    start_G = space.fill(space.top_G * 0, rng)
    seen = {start_G.tobytes()}
    children = space.children(start_G, 10, seen, rng, switches)
    assert len(seen) == 1 + len(children)  # all of them new, and none twice
    for level_G in children:
        assert ((level_G >= 0) & (level_G <= space.top_G)).all() and space.size(level_G) <= budget
    mutants = [space.mutant(start_G, rng, switches) for _ in range(5)]
    for level_G in (start_G, *(level_G for level_G in mutants if level_G is not None)):
        for sizes, level in zip(SIZES, level_G, strict=True):
            assert level + 1 == len(sizes) or sizes[level + 1] - sizes[level] > budget - space.size(level_G)


def test_a_neighbourhood_smaller_than_the_offspring_ends_the_search() -> None:
    space = Space([[1, 2], [1, 2]])
    told = search(space, lambda level_G: -float(level_G.sum()), offspring=50, generations=10**9)
    assert told[-1].evaluations == 4 and len(told) < 10
    for alone in (Space([[5], [7]]), Space([[1, 2], [3, 9]], budget=4)):  # no legal neighbour at all
        assert [each.evaluations for each in search(alone, lambda _: 0.0, generations=10**9)] == [1]


def test_stages_pass_the_best_on_and_the_champion_meets_them_on_its_own_ground() -> None:
    space, asked = Space([[1, 2, 3, 4]] * 8), []

    def score(genomes, stage: int) -> list[float]:
        asked.append((stage, len(genomes)))
        truth = np.array([float(level_G.sum()) for level_G in genomes])
        return list(truth if stage == 2 else 100 - truth)  # the cheap stages mislead

    *_, last = evolve(space, space.top_G * 0, score, generations=2, offspring=16, survivors=(4, 2, 1))
    assert asked == [(2, 1), (0, 16), (1, 4), (2, 2), (0, 16), (1, 4), (2, 2)]
    assert last.evaluations == 33
    # a child of the first generation was better than the champion at the last stage, however bad at the first
    assert last.fitness == last.champion_G.sum() > 0


def test_fitness_never_falls_and_seeds_decide() -> None:
    space = Space([[1, 2, 3, 4]] * 6, budget=14)
    weight_G = np.random.default_rng(1).lognormal(size=6)

    def fitness(level_G: np.ndarray) -> float:
        return -float((weight_G * 0.25**level_G).sum())

    one, again, other = (search(space, fitness, generations=12, seed=seed) for seed in (3, 3, 4))
    path = [(told.fitness, told.champion_G.tolist(), told.evaluations) for told in one]
    assert path == [(told.fitness, told.champion_G.tolist(), told.evaluations) for told in again]
    assert [told.fitness for told in one] != [told.fitness for told in other]
    assert all(later.fitness >= earlier.fitness for earlier, later in pairwise(one))


def test_a_search_goes_on_where_it_was_broken_off_when_scores_are_remembered() -> None:
    space, fitness, known, scored = Space(SIZES), rugged(), {}, []

    def score(genomes, _stage: int) -> list[float]:
        for level_G in genomes:
            if level_G.tobytes() not in known:
                if len(scored) == 20:
                    raise KeyboardInterrupt
                scored.append(level_G)
                known[level_G.tobytes()] = fitness(level_G)
        return [known[level_G.tobytes()] for level_G in genomes]

    def run() -> list[tuple[float, list[int]]]:
        told = evolve(space, space.top_G * 0, score, generations=8, offspring=4)
        return [(each.fitness, each.champion_G.tolist()) for each in told]

    with pytest.raises(KeyboardInterrupt):
        run()
    scored.clear()
    resumed = run()
    assert len(scored) < len(known)  # the first 20 were not scored again
    assert resumed == [
        (each.fitness, each.champion_G.tolist()) for each in search(space, fitness, generations=8, offspring=4)
    ]


@pytest.mark.parametrize("when", [1, 7])
def test_a_fitness_that_is_no_number_is_one_line(when: int) -> None:
    calls = iter(range(100))
    with pytest.raises(BitallocError, match=r"fitness of a genome at stage 1 is NaN.*check its weights") as error:
        search(Space(SIZES), lambda _: np.nan if next(calls) >= when else 0.0)
    assert "\n" not in str(error.value)


def test_a_budget_below_the_lowest_levels_is_refused() -> None:
    with pytest.raises(BitallocError, match="budget of 43 bytes is below the 44 of the lowest levels"):
        Space(SIZES, 43)
