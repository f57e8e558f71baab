"""Sets of units within a byte budget: which are worth measuring, and which of the measured to choose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bitalloc.errors import BitallocError
from bitalloc.fairness.damage import ENGLISH, NONE, REFERENCE, Damage

PUBLISHED = (0, 9, 11), 12  # "protect L0 + L9 + L11" of a model of twelve blocks
EXHAUSTIVE = 64  # sets that are all measured rather than searched
Set = frozenset[str]


@dataclass(frozen=True)
class Units:
    """What can be protected, in the order of the forward pass, and what it costs in bytes.

    `base` bytes of the whole checkpoint with nothing protected, `rest` of them outside the `weights` that are rounded;
    `added[u]` bytes that protecting a unit adds.
    """

    added: Mapping[str, int]
    base: int
    rest: int
    weights: int

    @classmethod
    def of(cls, sets: pd.DataFrame) -> Units:
        """From SETS, which holds `none` and every single unit."""
        rows = sets.set_index("plan")
        base = int(rows.loc[NONE, "nbytes"])
        added = {plan: int(rows.loc[plan, "nbytes"]) - base for plan in rows.index if rows.loc[plan, "size"] == 1}
        first = rows.loc[NONE]
        return cls(added, base, base - int(first["matrices_nbytes"]), int(first["weights"]))

    def name(self, protected: Iterable[str]) -> str:
        """
        >>> Units({"wte": 1, "h.0": 1, "h.10": 1}, 0, 0, 1).name({"h.10", "h.0"})
        'h.0+h.10'
        """
        return "+".join(unit for unit in self.added if unit in set(protected)) or NONE

    def parse(self, plan: str) -> Set:
        return frozenset() if plan == NONE else frozenset(plan.split("+"))

    def nbytes(self, protected: Iterable[str]) -> int:
        """Bytes of the whole checkpoint."""
        return self.base + sum(self.added[unit] for unit in protected)

    def bits_per_weight(self, nbytes: int) -> float:
        return 8 * (nbytes - self.rest) / self.weights

    def budget(self, bits_per_weight: float) -> int:
        """Bytes of the whole checkpoint at that many bits a weight of what may be rounded."""
        return self.rest + math.floor(bits_per_weight * self.weights / 8)

    def require(self, budget: int, text: str) -> None:
        """Raise `BitallocError` unless the budget holds the unprotected model, and no more than all of it protected."""
        least, most = self.base, self.nbytes(self.added)
        if not least <= budget <= most:
            side = "below the least" if budget < least else "above the most"
            ends = f"{self.bits_per_weight(least):.3f} to {self.bits_per_weight(most):.3f} bpw"
            raise BitallocError(
                f"budget {text!r} is {budget:,} bytes, {side} possible; reachable: {least:,} to {most:,} bytes ({ends})"
            )

    def filled(self, order: Iterable[str], budget: int) -> Set:
        """Units in that order as long as they fit; one that does not is passed over.

        >>> sorted(Units({"a": 5, "b": 9, "c": 4}, 100, 0, 1).filled("abc", 110))
        ['a', 'c']
        """
        kept: set[str] = set()
        for unit in order:
            if self.nbytes({*kept, unit}) <= budget:
                kept.add(unit)
        return frozenset(kept)


def published(units: Units) -> Set:
    """Blocks 0, 9 and 11 of twelve; of n blocks those at the same relative depth, round(k (n - 1) / 11).

    >>> sorted(published(Units({f"h.{n}": 1 for n in range(4)}, 0, 0, 1)))
    ['h.0', 'h.2', 'h.3']
    """
    blocks = [unit for unit in units.added if unit.startswith("h.")]
    places, depth = PUBLISHED
    return frozenset(f"h.{math.floor(k * (len(blocks) - 1) / (depth - 1) + 0.5)}" for k in places)


def random_sets(units: Units, budget: int, seeds: Iterable[int]) -> list[Set]:
    """One set a seed: units in random order as long as they fit the budget."""
    names = list(units.added)
    return [units.filled(np.random.default_rng([9, seed]).permutation(names).tolist(), budget) for seed in seeds]


class Search:
    """Sets that are worth measuring: every unit, pairs, and from there greedily with synergies; all that fit, if few.

    `measure(sets)` puts the scores of sets into `damage`. What a set promises is told by measured singles and pairs,
    language by language: relative(S) = relative(none) - sum of single gains - sum of synergies. That only proposes:
    what is chosen was measured.
    """

    def __init__(
        self, units: Units, budget: int, damage: Damage, measure: Callable[[Sequence[Set]], None], *, pairs: int = 100
    ) -> None:
        """`pairs`: how many are measured at most; where there are more, those among the best single units."""
        self.units, self.budget, self.damage, self._measure, self.pairs = units, budget, damage, measure, pairs

    def fits(self, protected: Set) -> bool:
        return self.units.nbytes(protected) <= self.budget

    def relative(self, protected: Iterable[str]) -> np.ndarray:
        return self.damage.relative(self.units.name(protected))[0]

    def measured(self, protected: Iterable[str]) -> bool:
        return self.units.name(protected) in self.damage.nll

    def measure(self, sets: Iterable[Set]) -> None:
        fresh = {self.units.name(each): each for each in sets if not self.measured(each)}
        if fresh:
            self._measure(list(fresh.values()))

    def sweep(self, objective: Callable[[np.ndarray], float]) -> None:
        """Nothing protected, every unit alone, and pairs: all, or those among the units that are best alone."""
        self.measure([frozenset(), *(frozenset([unit]) for unit in self.units.added)])
        best = sorted(self.units.added, key=lambda unit: objective(self.relative([unit])))
        most = max(2, math.floor((1 + math.sqrt(1 + 8 * self.pairs)) / 2))
        self.measure(frozenset(pair) for pair in itertools.combinations(best[:most], 2))

    def explore(self, objective: Callable[[np.ndarray], float], *, width: int = 3) -> None:
        """Measure what may have the least `objective` of relative damage [L] within the budget."""
        self.sweep(objective)
        if (every := self._every()) is not None:
            return self.measure(every)
        pairs = [frozenset(pair) for pair in itertools.combinations(self.units.added, 2) if self.measured(pair)]
        starts = [frozenset[str]()]
        starts += sorted(filter(self.fits, pairs), key=lambda pair: objective(self.relative(pair)))[:1]
        steps = [*(frozenset([unit]) for unit in self.units.added), *pairs]
        for now in starts:
            while ahead := {now | step for step in steps if not step <= now and self.fits(now | step)}:
                # by bytes too: a pair that is no better than a unit waits
                ranked = sorted(ahead, key=lambda each: (objective(self.predict(each)), self.units.name(each)))
                self.measure(ranked[:width])
                now = min(ranked[:width], key=lambda each: objective(self.relative(each)))  # noqa: PLW2901

    def _every(self) -> list[Set] | None:
        """All sets that fit, where they are few."""
        found: list[Set] = [frozenset()]
        for unit in self.units.added:
            found += [each | {unit} for each in found if self.fits(each | {unit})]
            if len(found) > EXHAUSTIVE:
                return None
        return found

    def promising(self, objective: Callable[[np.ndarray], float]) -> Set:
        """The set that greedy steps by `predict` alone end at, the best on the way; nothing is measured."""
        now, best = frozenset[str](), frozenset[str]()
        steps = [frozenset([unit]) for unit in self.units.added]
        steps += [frozenset(pair) for pair in itertools.combinations(self.units.added, 2) if self.measured(pair)]
        while ahead := {now | step for step in steps if not step <= now and self.fits(now | step)}:
            now = min(ahead, key=lambda each: (objective(self.predict(each)), self.units.name(each)))
            best = min(best, now, key=lambda each: objective(self.predict(each)))
        return best

    def predict(self, protected: Set) -> np.ndarray:
        """Relative damage [L] by singles and measured pairs."""
        if self.measured(protected):
            return self.relative(protected)
        none = self.relative([])
        value = none - sum((none - self.relative([unit]) for unit in protected), np.zeros(len(none)))
        for pair in itertools.combinations(sorted(protected), 2):
            if self.measured(pair):
                first, second = (self.relative([unit]) for unit in pair)
                value = value - (first + second - none - self.relative(pair))
        return value


@dataclass(frozen=True)
class Choice:
    """The plan of least worst_rel within the budget, and how sure that is.

    `confidence`: share of resamples of the select split in which the very same set wins; `frequency[u]`: share in which
    the winner protects the unit. Both are conditional on the sets that were measured.
    """

    plan: str
    confidence: float
    frequency: Mapping[str, float]


def choose(
    damage: Damage, units: Units, budget: int, *, margin: float = 0.01, objective: Sequence[int] | None = None
) -> Choice:
    """Of the measured sets within the budget the one of least worst_rel; among equals the one of fewer bytes.

    `objective`: places of the languages whose maximum counts, and then there is no margin; all that are ranked unless
    given. See `winner`.
    """
    plans = [plan for plan in damage.nll if plan != REFERENCE and units.nbytes(units.parse(plan)) <= budget]
    plans.sort(key=lambda plan: (units.nbytes(units.parse(plan)), plan))
    limit = margin if objective is None else math.inf
    chosen, share = winner(damage, plans, damage.ranked if objective is None else objective, margin=limit)
    frequency = {unit: sum(share[plan] for plan in plans if unit in units.parse(plan)) for unit in units.added}
    return Choice(chosen, share[chosen], frequency)


def winner(
    damage: Damage, plans: Sequence[str], places: Sequence[int], *, margin: float, base: str = NONE
) -> tuple[str, dict[str, float]]:
    """The plan of least maximum damage over the languages at `places`, the first of equals; plan -> share of wins.

    English may lose at most `margin` of relative damage more than under the plan `base`, judged by the upper end of the
    paired interval (non-inferiority); without English there is no such condition. The share is over resamples. Raises
    `BitallocError` when there is no language to judge by.
    """
    places = list(places)
    if not places:
        raise BitallocError(
            "in no language is the model better than a byte-unigram model: nothing can be ranked; use another model"
        )
    worst_P = np.array([damage.relative(plan)[0][places].max() for plan in plans])
    worst_RP = np.stack([damage.relative(plan)[1][:, places].max(1) for plan in plans], axis=1)
    allowed_P, allowed_RP = np.ones(len(plans), bool), np.ones(worst_RP.shape, bool)
    if ENGLISH in damage.languages and math.isfinite(margin):
        n = damage.share(ENGLISH)
        for p, plan in enumerate(plans):
            found = damage.excess(plan, base=base)
            allowed_P[p] = plan == base or found.hi <= margin
            excess_R = damage.relative(plan)[1][:, n] - damage.relative(base)[1][:, n]
            allowed_RP[:, p] = (plan == base) | (excess_R + (found.hi - found.value) <= margin)
    wins_R = np.where(allowed_RP, worst_RP, np.inf).argmin(1)
    share_P = np.bincount(wins_R, minlength=len(plans)) / len(wins_R)
    chosen = plans[int(np.where(allowed_P, worst_P, np.inf).argmin())]
    return chosen, dict(zip(plans, share_P.tolist(), strict=True))
