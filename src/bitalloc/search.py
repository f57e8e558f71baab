"""Search: (1 + lambda) evolution of genomes by level switches, whatever genes and levels stand for.

Children differ from the champion by one to `switches` switches of a level, and keep its bytes where there is a budget.
They pass through stages of growing effort: many are scored cheaply, the survivors dearly, and the best of the last
stage meets the champion, whose score on the same material is known. After EvoPress (Sieberling et al., 2024,
https://arxiv.org/abs/2410.14649, section 3). No genome is tried twice, and where nothing new is left the search ends.

Legend: G genes, L levels by rising bytes; `level_G` is a genome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from bitalloc.errors import BitallocError

Genome = NDArray[np.int64]
Score = Callable[[Sequence[Genome], int], Sequence[float]]  # (genomes, stage) -> fitness of each, more is better
_TRIES = 8  # draws for each child that is wanted, before the neighbourhood is gone through one by one


class Space:
    """What a genome may be: the bytes of every level of every gene, and a budget in bytes or none.

    >>> space = Space([[1, 2, 4], [1, 2, 4]], budget=6)
    >>> space.size(np.array([2, 1])), space.size(np.array([2, 2]))
    (6, 8)
    """

    def __init__(self, nbytes: Sequence[Sequence[int]], budget: int | None = None) -> None:
        """`nbytes`: of each gene the bytes of its levels, strictly rising. A gene of one level is fixed.

        Raises `BitallocError` when not even the lowest levels fit the budget.
        """
        self.budget, self.top_G = budget, np.array([len(levels) - 1 for levels in nbytes])
        self.genes = np.arange(len(nbytes))
        self.nbytes_GL = np.full((len(nbytes), self.top_G.max() + 2), np.iinfo(np.int64).max // 4)
        for row_L, levels in zip(self.nbytes_GL, nbytes, strict=True):
            row_L[: len(levels)] = levels
        if budget is not None and (least := self.size(self.top_G * 0)) > budget:
            raise BitallocError(f"a budget of {budget:,} bytes is below the {least:,} of the lowest levels; raise it")

    def size(self, level_G: Genome) -> int:
        return int(self.nbytes_GL[self.genes, level_G].sum())

    def fill(self, level_G: Genome, rng: np.random.Generator) -> Genome:
        """Raise levels of genes drawn at random until nothing fits any more."""
        assert self.budget is not None
        level_G, free = level_G.copy(), self.budget - self.size(level_G)
        added_G = self.nbytes_GL[self.genes, level_G + 1] - self.nbytes_GL[self.genes, level_G]
        while len(fits := (added_G <= free).nonzero()[0]):
            i = fits[rng.integers(len(fits))]
            free -= int(added_G[i])
            level_G[i] += 1
            added_G[i] = self.nbytes_GL[i, level_G[i] + 1] - self.nbytes_GL[i, level_G[i]]
        return level_G

    def mutant(self, level_G: Genome, rng: np.random.Generator, switches: int = 1) -> Genome | None:
        """A genome one to `switches` switches away; None when the draw leads nowhere.

        Without a budget a switch moves a gene by a level. With one it raises a gene by a level and lowers others, drawn
        one by one, until the whole fits; what is left over is filled again.
        """
        level_G = level_G.copy()
        for _ in range(rng.integers(1, switches + 1)):
            up = self.budget is not None or rng.random() < 0.5
            able = (level_G < self.top_G if up else level_G > 0).nonzero()[0]
            if not len(able):
                return None
            raised = able[rng.integers(len(able))]
            level_G[raised] += 1 if up else -1
            if self.budget is not None and not self._lower(level_G, self.size(level_G) - self.budget, raised, rng):
                return None
        return level_G if self.budget is None else self.fill(level_G, rng)

    def _lower(self, level_G: Genome, excess: int, kept: int, rng: np.random.Generator) -> bool:
        """Lower genes other than `kept` in place until `excess` bytes are saved; whether that can be done."""
        able = level_G > 0
        able[kept] = False
        while excess > 0:
            if not len(places := able.nonzero()[0]):
                return False
            i = places[rng.integers(len(places))]
            level_G[i] -= 1
            able[i] = level_G[i] > 0
            excess -= int(self.nbytes_GL[i, level_G[i] + 1] - self.nbytes_GL[i, level_G[i]])
        return True

    def neighbours(self, level_G: Genome) -> Iterator[Genome]:
        """Every genome a switch away: a gene moved by a level; with a budget one raised, one lowered if need be."""
        for i in self.genes:
            for step in (1, -1) if self.budget is None else (1,):
                if not 0 <= level_G[i] + step <= self.top_G[i]:
                    continue
                moved_G = level_G.copy()
                moved_G[i] += step
                if self.budget is None or self.size(moved_G) <= self.budget:
                    yield moved_G
                    continue
                for j in np.flatnonzero((level_G > 0) & (self.genes != i)):
                    paid_G = moved_G.copy()
                    paid_G[j] -= 1
                    if self.size(paid_G) <= self.budget:
                        yield paid_G

    def children(
        self, level_G: Genome, count: int, seen: set[bytes], rng: np.random.Generator, switches: int
    ) -> list[Genome]:
        """At most `count` genomes that were never seen, which they are now. None is left when the list is empty."""
        drawn = (self.mutant(level_G, rng, switches) for _ in range(_TRIES * count))
        found = list(islice(_unseen(drawn, seen), count))
        return found + list(islice(_unseen(self.neighbours(level_G), seen), count - len(found)))


def _unseen(genomes: Iterator[Genome | None], seen: set[bytes]) -> Iterator[Genome]:
    for level_G in genomes:
        if level_G is not None and (key := level_G.tobytes()) not in seen:
            seen.add(key)
            yield level_G


@dataclass(frozen=True, eq=False)
class Generation:
    """The champion after `index` generations; `evaluations` genomes were scored up to here, at whatever stage."""

    index: int
    champion_G: Genome
    fitness: float
    evaluations: int


def evolve(
    space: Space,
    start_G: Genome,
    score: Score,
    *,
    generations: int,
    offspring: int,
    survivors: Sequence[int] = (1,),
    switches: int = 3,
    seed: int = 0,
) -> Iterator[Generation]:
    """The start, then each generation as soon as it is finished; fewer of them when nothing new is left to try.

    `survivors[s]` genomes outlive stage s; the last stage has one. All that is drawn depends on `seed` and on the
    number of the generation alone, so a search whose scores are remembered goes on where it was broken off. Raises
    `BitallocError` when a fitness is NaN.
    """
    champion_G, seen = start_G, {start_G.tobytes()}
    [fitness] = _scored(score, [start_G], len(survivors) - 1)
    evaluations = 1
    yield Generation(0, champion_G, fitness, evaluations)
    for index in range(1, generations + 1):
        pool = space.children(champion_G, offspring, seen, np.random.default_rng([seed, index]), switches)
        if not pool:
            return
        evaluations += len(pool)
        for stage, count in enumerate(survivors):
            found = _scored(score, pool, stage)
            order = np.argsort(-found, kind="stable")[:count]
            pool, best = [pool[place] for place in order], found[order[0]]
        if best > fitness:
            champion_G, fitness = pool[0], float(best)
        yield Generation(index, champion_G, fitness, evaluations)


def _scored(score: Score, genomes: Sequence[Genome], stage: int) -> NDArray[np.float64]:
    found = np.asarray(score(genomes, stage), dtype=np.float64)
    if np.isnan(found).any():
        raise BitallocError(
            f"the fitness of a genome at stage {stage + 1} is NaN, so nothing can be chosen; check its weights"
        )
    return found
