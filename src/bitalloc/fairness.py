"""Fairness: what quantisation costs each language, and which layers to protect so that none pays for the others.

Everything is computed from SENTENCES: the summed NLL of every aligned sentence in every language, under the unquantised
model (`reference`), with every layer at low precision (`none`) and with sets of layers protected (`h.0+h.3`). One
split selects, another reports. Intervals are 95 %, from one bootstrap of aligned sentences: a resample takes the same
sentences in every language and under every plan, so that differences are paired.

A unit is what is protected as a whole: a block (`h.3`), an embedding (`wte`) or a head of its own (`lm_head`).

Legend: L languages, I aligned sentences, R bootstrap resamples; a set is a frozenset of units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bitalloc.errors import BitallocError
from bitalloc.statistics import MIN_CLUSTERS, Estimate, mean_interval, resample, share_interval, units_drawn
from bitalloc.statistics.intervals import PSEUDO_ITEMS
from bitalloc.statistics.ranks import spearman
from bitalloc.statistics.verdicts import NOT_RUN, above, below
from bitalloc.tables import ARMS, CRITERIA, FAIRNESS, PROTECTED, SETS, SYNERGY

NONE, REFERENCE, ALL = "none", "reference", "all"
FAIR, ENGLISH_ONLY, PATTERN, ALLOCATOR, RANDOM = "fair", "english", "pattern", "allocator", "random"
ENGLISH = "en"
PUBLISHED = (0, 9, 11), 12  # "protect L0 + L9 + L11" of a model of twelve blocks
EXHAUSTIVE = 64  # sets that are all measured rather than searched
Set = frozenset[str]
Row = dict[str, Any]


# ---- the statistics of one language ------------------------------------------------------------------
def damage_nats(nll_I: np.ndarray, reference_I: np.ndarray) -> float:
    """mean_i (nll_i - reference_i): nats that an aligned sentence costs more. The primary metric.

    The sentence says the same in every language, however many tokens or bytes a language takes for it.

    >>> damage_nats(np.array([11.0, 22.0]), np.array([10.0, 20.0]))
    1.5
    """
    return float(np.mean(np.asarray(nll_I) - reference_I))


def relative_damage(nll_I: np.ndarray, reference_I: np.ndarray) -> float:
    """sum_i (nll_i - reference_i) / sum_i reference_i: the damage as a share of what the sentences cost before.

    >>> round(relative_damage(np.array([11.0, 22.0]), np.array([10.0, 20.0])), 3)
    0.1
    """
    return float(np.sum(np.asarray(nll_I) - reference_I) / np.sum(reference_I))


def delta_bits(nll_I: np.ndarray, reference_I: np.ndarray, size_I: np.ndarray) -> float:
    """sum_i (nll_i - reference_i) / (ln 2 sum_i size_i): bits a byte (or character) more.

    >>> round(delta_bits(np.array([3 * math.log(2)]), np.array([math.log(2)]), np.array([4])), 6)
    0.5
    """
    return float(np.sum(np.asarray(nll_I) - reference_I) / (math.log(2) * np.sum(size_I)))


def delta_ppl(nll_I: np.ndarray, reference_I: np.ndarray, tokens_I: np.ndarray) -> float:
    """exp(sum nll / sum tokens) - exp(sum reference / sum tokens). Not comparable over languages: tokens differ.

    >>> round(delta_ppl(np.array([2 * math.log(6)]), np.array([2 * math.log(5)]), np.array([2])), 6)
    1.0
    """
    tokens = np.sum(tokens_I)
    with np.errstate(over="ignore"):
        return float(np.exp(np.sum(nll_I) / tokens) - np.exp(np.sum(reference_I) / tokens))


def fertility(tokens_I: np.ndarray, english_I: np.ndarray) -> float:
    """sum tokens / sum tokens of English for the same sentences (the premium of Petrov et al. 2023, 2305.15425).

    >>> fertility(np.array([30, 30]), np.array([10, 5]))
    4.0
    """
    return float(np.sum(tokens_I) / np.sum(english_I))


# ---- the statistics over languages -------------------------------------------------------------------
def worst_rel(relative_L: Sequence[float]) -> float:
    """max over languages of the relative damage: what is minimised.

    >>> worst_rel([0.1, 0.3, 0.2])
    0.3
    """
    return float(np.max(relative_L))


def gap(relative_L: Sequence[float]) -> float:
    """max - min over languages of the relative damage. Harming the best language lowers it: never an objective.

    >>> round(gap([0.1, 0.3, 0.2]), 6)
    0.2
    """
    return float(np.ptp(relative_L))


def ratio(relative_L: Sequence[float], lo_L: Sequence[float]) -> float | None:
    """max / min of the relative damage; None unless every language is surely damaged (its interval is above 0).

    >>> ratio([0.1, 0.3], [0.05, 0.2]), ratio([0.1, 0.3], [-0.01, 0.2])
    (3.0, None)
    """
    if not np.all(np.asarray(lo_L) > 0):
        return None
    return round(float(np.max(relative_L) / np.min(relative_L)), 12)


def synergy(none: float, first: float, second: float, both: float) -> float:
    """(none - both) - (none - first) - (none - second): damage that a pair removes beyond the sum of its members.

    >>> synergy(none=1.0, first=0.9, second=0.9, both=0.2)  # neither helps alone
    0.6
    """
    return round(first + second - none - both, 12)


def unigram_nats(fitted: Iterable[str], scored: Iterable[str]) -> np.ndarray:
    """-sum log p(byte) of each scored text under the byte frequencies of the fitted ones, add-one over 256 bytes.

    A reference that needs as many nats has learned nothing of the language but its alphabet: the floor.

    >>> (unigram_nats(["ab"], ["a", "zz"]) / math.log(258)).round(3).tolist()  # (1 + 1) / (2 + 256), 1 / 258
    [0.875, 2.0]
    """
    count_B = np.bincount(np.frombuffer("".join(fitted).encode(), dtype=np.uint8), minlength=256) + 1
    nats_B = -np.log(count_B / count_B.sum())
    return np.array([nats_B[np.frombuffer(text.encode(), dtype=np.uint8)].sum() for text in scored])


# ---- all plans on the aligned sentences of one split ---------------------------------------------------
class Damage:
    """What plans do to every language of one split; plans can be added as they are measured."""

    def __init__(
        self,
        sentences: pd.DataFrame,
        split: str,
        *,
        floor: Sequence[str] | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        """`sentences`: SENTENCES with at least the rows of `reference` in this split.

        `floor`: languages that are not ranked; the report split finds them, and the select split is told (`both`).
        Raises `BitallocError` where the sentences of languages are not aligned.
        """
        rows = sentences[sentences["split"] == split]
        reference = rows[rows["plan"] == REFERENCE]
        if reference.empty:
            raise BitallocError(f"no scores of the reference on the {split} split; run `quant-fairness sweep` first")
        self.languages = tuple(dict.fromkeys(reference["language"]))
        self.split, self.model = split, str(reference["model"].iloc[0])
        self.sentences = np.unique(reference["sentence"])
        wide = self._wide(reference)
        self._of = {name: wide(name) for name in ("ntokens", "nbytes", "nchars", "unigram_nats")}
        self.reference_LI, group_I = wide("nll_nats"), wide("group")[0]
        if len(np.unique(group_I)) < MIN_CLUSTERS:  # groups would stand still, and intervals be far too narrow
            raise BitallocError(f"{split}: {len(np.unique(group_I))} groups of sentences, {MIN_CLUSTERS} are needed")
        self.units = units_drawn(group_I)
        self.counts_RI = resample(group_I, resamples, np.random.default_rng([seed, *split.encode()])).astype(float)
        self._sums_RL = self.counts_RI @ self.reference_LI.T
        self.nll: dict[str, np.ndarray] = {}
        self._relative: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for plan, part in rows.groupby("plan", sort=False):
            self.add(str(plan), part)
        found = [language for language in self.languages if self._floored(language)] if floor is None else floor
        self.floor = tuple(found)
        self.ranked = [n for n, language in enumerate(self.languages) if language not in self.floor]

    @classmethod
    def both(cls, sentences: pd.DataFrame, **how: int) -> tuple[Damage, Damage]:
        """(select, report); languages are floored by the report split in both."""
        report = cls(sentences, "report", **how)
        return cls(sentences, "select", floor=report.floor, **how), report

    def _wide(self, rows: pd.DataFrame) -> Callable[[str], np.ndarray]:
        """Column -> [L, I]; raises `BitallocError` unless every language has every sentence, once."""
        code_N = rows["language"].map({language: n for n, language in enumerate(self.languages)}).to_numpy()
        sentence_N = rows["sentence"].to_numpy()
        order_N = np.lexsort((sentence_N, code_N))
        shape = len(self.languages), len(self.sentences)
        if not np.array_equal(sentence_N[order_N], np.tile(self.sentences, shape[0])):
            raise BitallocError(
                f"{self.split}, plan {rows['plan'].iloc[0]}: some sentences are missing in some languages; sweep again"
            )
        return lambda name: rows[name].to_numpy(dtype=float)[order_N].reshape(shape)

    def add(self, plan: str, rows: pd.DataFrame) -> None:
        """SENTENCES of another plan; raises `BitallocError` when its sentences are not the reference's."""
        self.nll[plan] = self._wide(rows)("nll_nats")

    def relative(self, plan: str) -> tuple[np.ndarray, np.ndarray]:
        """Relative damage of each language, [L], and in every resample, [R, L]."""
        if plan not in self._relative:
            lost_LI = self.nll[plan] - self.reference_LI
            value_L = lost_LI.sum(1) / self.reference_LI.sum(1)
            self._relative[plan] = value_L, (self.counts_RI @ lost_LI.T) / self._sums_RL
        return self._relative[plan]

    def estimate(self, value: float, value_R: np.ndarray) -> Estimate:
        return mean_interval(value, value_R, self.units)

    def share(self, language: str) -> int:
        """Place of a language."""
        return self.languages.index(language)

    def bits_per_byte(self) -> dict[str, tuple[float, float]]:
        """Language -> bits a byte of the reference and of the byte-unigram model."""
        nbytes_L = self._of["nbytes"].sum(1) * math.log(2)
        both = self.reference_LI.sum(1) / nbytes_L, self._of["unigram_nats"].sum(1) / nbytes_L
        return {language: (float(both[0][n]), float(both[1][n])) for n, language in enumerate(self.languages)}

    def _floored(self, language: str) -> bool:
        """Not surely better than the byte-unigram model: the interval of reference - unigram is not below 0."""
        n = self.share(language)
        ahead_I = self.reference_LI[n] - self._of["unigram_nats"][n]
        return self.estimate(float(ahead_I.sum()), self.counts_RI @ ahead_I).hi >= 0

    # ---- rows of FAIRNESS
    def rows(self, plan: str) -> list[Row]:
        """Every metric of a plan: by language, then over those that are ranked (language `all`)."""
        rows = [row for language in self.languages for row in self._language(plan, language)]
        return rows + self._over(plan) if self.ranked and plan != REFERENCE else rows

    def _language(self, plan: str, language: str) -> list[Row]:
        n = self.share(language)
        nll_I, reference_I, counts_RI = self.nll[plan][n], self.reference_LI[n], self.counts_RI
        status = "floor" if language in self.floor else "ok"
        tokens_I, nbytes_I, chars_I = (self._of[name][n] for name in ("ntokens", "nbytes", "nchars"))
        if plan == REFERENCE:
            bits = math.log(2) * nbytes_I
            found = [
                ("reference_bits_per_byte", reference_I, bits),
                ("unigram_bits_per_byte", self._of["unigram_nats"][n], bits),
                ("reference_nats", reference_I, np.ones_like(bits)),
            ]
            if ENGLISH in self.languages:
                found.append(("fertility", tokens_I, self._of["ntokens"][self.share(ENGLISH)]))
            return [self._row(language, name, *self._quotient(over, under), status) for name, over, under in found]
        lost_I = nll_I - reference_I
        found = [
            ("damage_nats", lost_I, np.ones_like(lost_I)),
            ("damage_rel", lost_I, reference_I),
            ("delta_bits_per_byte", lost_I, math.log(2) * nbytes_I),
            ("delta_bits_per_char", lost_I, math.log(2) * chars_I),
        ]
        rows = [self._row(language, name, *self._quotient(over, under), status) for name, over, under in found]
        tokens_R = counts_RI @ tokens_I
        with np.errstate(over="ignore", invalid="ignore"):
            ppl_R = np.exp(counts_RI @ nll_I / tokens_R) - np.exp(counts_RI @ reference_I / tokens_R)
        value = delta_ppl(nll_I, reference_I, tokens_I)
        return [*rows, self._row(language, "delta_ppl", value, ppl_R, status)]

    def _quotient(self, over_I: np.ndarray, under_I: np.ndarray) -> tuple[float, np.ndarray]:
        return float(over_I.sum() / under_I.sum()), (self.counts_RI @ over_I) / (self.counts_RI @ under_I)

    def _over(self, plan: str) -> list[Row]:
        value_L, value_RL = self.relative(plan)
        value_L, value_RL = value_L[self.ranked], value_RL[:, self.ranked]
        rows = [self._row(ALL, "worst_rel", worst_rel(value_L), value_RL.max(1))]
        if len(self.ranked) < 2:
            alone = "undefined: one language is ranked"
            return rows + [self._row(ALL, metric, math.nan, np.zeros(1), alone) for metric in ("gap", "ratio")]
        rows.append(self._row(ALL, "gap", gap(value_L), np.ptp(value_RL, axis=1)))
        lo_L = [self.estimate(value, value_R).lo for value, value_R in zip(value_L, value_RL.T, strict=True)]
        found = ratio(value_L, lo_L)
        if found is None:
            why = "undefined: a language's damage may be 0"
            return [*rows, self._row(ALL, "ratio", math.nan, np.zeros(1), why)]
        return [*rows, self._row(ALL, "ratio", found, value_RL.max(1) / value_RL.min(1))]

    def _row(self, language: str, metric: str, value: float, value_R: np.ndarray, status: str = "ok") -> Row:
        found = self.estimate(value, value_R) if math.isfinite(value) else None
        ends = {"lo": found.lo, "hi": found.hi} if found else {"lo": math.nan, "hi": math.nan}
        place = {"split": self.split, "language": language, "metric": metric}
        return place | {"value": value if found else math.nan, **ends, "n": self.units, "status": status}

    # ---- comparisons of plans, paired
    def worst(self, plan: str) -> tuple[float, np.ndarray]:
        """worst_rel over the ranked languages, and in every resample."""
        value_L, value_RL = self.relative(plan)
        return worst_rel(value_L[self.ranked]), value_RL[:, self.ranked].max(1)

    def excess(self, plan: str, language: str = ENGLISH, base: str = NONE) -> Estimate:
        """Relative damage of a language under a plan less that under another."""
        n = self.share(language)
        (value_L, value_RL), (base_L, base_RL) = self.relative(plan), self.relative(base)
        return self.estimate(value_L[n] - base_L[n], value_RL[:, n] - base_RL[:, n])


# ---- sets of units, their bytes, and the search ----------------------------------------------------------
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


# ---- choosing among what was measured --------------------------------------------------------------------
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


def plan_arms(damage: Damage, plans: pd.DataFrame, *, margin: float) -> pd.DataFrame:
    """ARMS of the rows of PLANS at one budget. `damage`: what they do on the select split.

    Additive costs only propose: fair is whichever of the plans fair, english, optimal and uniform has the least
    worst_rel as measured, English within `margin` of what it loses under the plan that ignores languages.
    """
    at = plans.drop_duplicates("strategy").set_index("strategy")["plan"]
    entrants = [at[name] for name in ("fair", "english", "optimal", "uniform") if name in at]
    unknown, rows = math.nan, []
    if damage.ranked:
        chosen, share = winner(damage, entrants, damage.ranked, margin=margin, base=at["optimal"])
        rows.append(
            (FAIR, chosen, share[chosen], f"least worst_rel of {len(entrants)} plans, English within {margin:g}")
        )
    named = {
        "english": (ENGLISH_ONLY, "least predicted damage to English"),
        "uniform": ("uniform", "one option for all"),
    }
    named["optimal"] = ALLOCATOR, "least predicted damage, languages ignored"
    rows += [(arm, at[name], unknown, note) for name, (arm, note) in named.items() if name in at]
    drawn = plans.loc[plans["strategy"] == "random", "plan"]
    rows += [(f"{RANDOM}-{n:02d}", plan, unknown, "bits at random, within the budget") for n, plan in enumerate(drawn)]
    place = {"model": damage.model, **plans[["budget", "budget_bytes"]].iloc[0].set_axis(["budget", "budget_nbytes"])}
    told = ("arm", "plan", "confidence", "note")
    return _frame(ARMS, [place | dict(zip(told, row, strict=True)) for row in rows])


# ---- tables ------------------------------------------------------------------------------------------------
def synergies(damage: Damage, units: Units) -> pd.DataFrame:
    """SYNERGY: what every measured pair removes of worst_rel beyond the sum of its members."""
    rows = []
    for first, second in itertools.combinations(units.added, 2):
        both = units.name([first, second])
        if both in damage.nll and damage.ranked:
            four = [damage.worst(plan) for plan in (NONE, first, second, both)]
            value = synergy(*(each for each, _ in four))
            value_R = four[1][1] + four[2][1] - four[0][1] - four[3][1]
            found = damage.estimate(value, value_R)
            place = {"model": damage.model, "first": first, "second": second, "worst_rel": four[3][0]}
            rows.append(place | {"value": found.value, "lo": found.lo, "hi": found.hi, "n": damage.units})
    return _frame(SYNERGY, rows)


def protected(damage: Damage, units: Units, choice: Choice, budget: str) -> pd.DataFrame:
    """PROTECTED: every unit, what protecting it alone does, whether it was chosen and how often it would be."""
    rows, (none, none_R) = [], damage.worst(NONE)
    chosen = units.parse(choice.plan)
    for unit, added in units.added.items():
        value, value_R = damage.worst(unit)
        found = damage.estimate(none - value, none_R - value_R)
        place = {"model": damage.model, "budget": budget, "unit": unit, "nbytes": added, "chosen": unit in chosen}
        place["frequency"] = choice.frequency[unit]
        rows.append(place | {"value": found.value, "lo": found.lo, "hi": found.hi, "n": damage.units})
    return _frame(PROTECTED, rows)


def fairness(
    sentences: pd.DataFrame,
    sets: pd.DataFrame,
    arms: pd.DataFrame,
    answers: pd.DataFrame | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """FAIRNESS: every arm on the report split, by language and over languages, and against the fair one.

    `answers`: plan, language, item, acc of multiple-choice items that each plan was asked, where there are some.
    """
    damage, nbytes = Damage(sentences, "report", resamples=resamples, seed=seed), sets.set_index("plan")["nbytes"]
    of = arms.set_index("arm")["plan"]
    fair = of.get(FAIR, NONE)  # none: all floored, and nothing is ranked
    base = next((arm for arm in (NONE, ALLOCATOR) if arm in of), None)  # what English is held against
    rows: list[Row] = []
    for arm, plan in [(REFERENCE, REFERENCE), *arms[["arm", "plan"]].itertuples(index=False, name=None)]:
        place = {"arm": arm, "plan": plan, "nbytes": float(nbytes.get(plan, math.nan))}
        found = damage.rows(plan)
        if damage.ranked and plan != REFERENCE:
            value, value_R = (each - other for each, other in zip(damage.worst(plan), damage.worst(fair), strict=True))
            found.append(damage._row(ALL, "worst_rel_over_fair", value, value_R))
            if ENGLISH in damage.languages and base:
                own = damage.excess(plan, base=of[base])
                ends = {"value": own.value, "lo": own.lo, "hi": own.hi, "n": damage.units, "status": "ok"}
                found.append({"split": "report", "language": ENGLISH, "metric": f"excess_over_{base}", **ends})
        if answers is not None and len(answers):
            found += _accuracy(answers, plan, damage, resamples=resamples, seed=seed)
        rows += [place | row for row in found]
    rows += _random(damage, arms, fair)
    place = {"model": damage.model, "budget": arms["budget"].iloc[0]}
    return _frame(FAIRNESS, [place | row for row in rows])


def _random(damage: Damage, arms: pd.DataFrame, fair: str) -> list[Row]:
    """The mean over the seeds of random protection, what protecting anything at all brings, and all arms against it."""
    drawn = arms["arm"].str.startswith(f"{RANDOM}-")
    plans = arms.loc[drawn, "plan"].tolist()
    if not plans or not damage.ranked:
        return []
    worst = [damage.worst(plan) for plan in plans]
    value, value_R = float(np.mean([each for each, _ in worst])), np.mean([each_R for _, each_R in worst], axis=0)
    own, own_R = damage.worst(fair)
    found = [
        damage._row(ALL, "worst_rel", value, value_R),
        damage._row(ALL, "worst_rel_over_fair", value - own, value_R - own_R),
    ]
    note = f"mean of {len(plans)} seeds, {len(set(plans))} different sets"
    rows = [{"arm": RANDOM, "plan": "", "nbytes": math.nan, **row, "status": note} for row in found]
    for arm, plan in arms.loc[~drawn, ["arm", "plan"]].itertuples(index=False, name=None):
        own, own_R = damage.worst(plan)
        row = damage._row(ALL, "random_over_this", value - own, value_R - own_R)
        rows.append({"arm": arm, "plan": plan, "nbytes": math.nan, **row})
    return rows


# ---- what is claimed, and what came of it ----------------------------------------------------------------
MARGIN = 0.001  # nats a token: a thousandth of PPL, within which real codes count as the simulated ones


def criteria(table: pd.DataFrame, backends: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """CRITERIA of one model, from FAIRNESS of all budgets and BACKENDS of sets in packed codes.

    Does the published pattern spare the worst-off more than random sets of its bytes do; does the fair set or plan more
    than the other arms; do packed codes lose what was simulated; does low damage mean that accuracy is kept? The last
    is Spearman's rho, over arms and languages, of relative damage against accuracy lost: resampled by arm.
    """
    model, rows = table["model"].iloc[0], []
    over = table[table["metric"].isin(["worst_rel_over_fair", "random_over_this"])].set_index(
        ["budget", "arm", "metric"]
    )
    over = over[~over.index.duplicated()]
    for budget in dict.fromkeys(table["budget"]):
        asked = [("pattern beats random sets", (PATTERN, "random_over_this"))]
        asked += [
            (f"fair beats {arm}", (arm, "worst_rel_over_fair")) for arm in (ALLOCATOR, ENGLISH_ONLY, PATTERN, RANDOM)
        ]
        for criterion, (arm, metric) in asked:
            if (budget, arm, metric) not in over.index:
                continue
            row = over.loc[(budget, arm, metric)]
            found = Estimate(row["value"], row["lo"], row["hi"], math.nan, math.nan)
            place = {"criterion": f"{criterion}, {budget}", "corpus": "all", "metric": "worst_rel", "n": row["n"]}
            why = "difference of the worst relative damage"
            rows.append(place | _interval(found) | {"comparison": "> 0", "verdict": above(found, 0.0), "why": why})
    for row in backends[backends["status"] == "measured"].itertuples():
        found = Estimate(row.loss_nats_per_token, row.loss_lo, row.loss_hi, math.nan, math.nan)
        place = {"criterion": f"packed codes lose nothing, {row.plan}", "corpus": row.task.partition("/")[0]}
        told = {
            "comparison": f"< {MARGIN:g}",
            "verdict": below(found, MARGIN),
            "why": f"above simulated, {row.backend}",
        }
        rows.append(place | {"metric": "nll_nats_per_token", "n": 0} | _interval(found) | told)
    rows.append(_tells_accuracy(table, seed=seed, resamples=resamples))
    return _frame(CRITERIA, [{"model": model, **row} for row in rows])


def _tells_accuracy(table: pd.DataFrame, *, seed: int, resamples: int) -> Row:
    place: Row = {"criterion": "damage tells lost accuracy", "corpus": "all", "metric": "spearman"}
    wide = table[table["metric"].isin(["damage_rel", "delta_acc"])]
    wide = wide.pivot_table(index=["budget", "arm", "language"], columns="metric", values="value")
    if "delta_acc" not in wide or len(wide := wide.dropna()) < 8:
        nothing = {"value": math.nan, "lo": math.nan, "hi": math.nan, "n": 0, "comparison": "", "verdict": NOT_RUN}
        return place | nothing | {"why": "no multiple-choice items in these languages"}
    arm_I = wide.reset_index("language").index.factorize()[0]
    pair_2I = wide["damage_rel"].to_numpy(), -wide["delta_acc"].to_numpy()
    value = float(spearman(*(each_I[None] for each_I in pair_2I))[0])
    rng, value_R = np.random.default_rng([seed, 11]), np.zeros(resamples)
    of_A = [np.flatnonzero(arm_I == arm) for arm in range(arm_I.max() + 1)]
    for r in range(resamples):
        drawn_I = np.concatenate([of_A[a] for a in rng.integers(len(of_A), size=len(of_A))])
        value_R[r] = spearman(*(each_I[drawn_I][None] for each_I in pair_2I))[0]
    lo, hi = np.nanquantile(value_R, [0.025, 0.975])
    found = Estimate(value, float(lo), float(hi), math.nan, math.nan)
    told = {"comparison": "> 0", "verdict": above(found, 0.0), "why": f"{len(of_A)} arms x languages; 1 would tell all"}
    return place | {"n": len(wide)} | _interval(found) | told


def _interval(found: Estimate) -> Row:
    return {"value": found.value, "lo": found.lo, "hi": found.hi}


def _accuracy(answers: pd.DataFrame, plan: str, damage: Damage, *, resamples: int, seed: int) -> list[Row]:
    """Accuracy of multiple-choice items by language (Wilson), and what it lost against the reference, item by item."""
    rows = []
    for language in damage.languages:
        own = answers[answers["language"] == language].pivot(index="item", columns="plan", values="acc")
        if plan not in own or own.empty:
            continue
        share, n = float(own[plan].mean()), len(own)
        lost_I = (own[plan] - own[REFERENCE]).to_numpy()
        counts_RI = resample(np.arange(n), resamples, np.random.default_rng([seed, 7])).astype(float)
        lost = mean_interval(float(lost_I.mean()), counts_RI @ lost_I / n, n, PSEUDO_ITEMS / n**2)
        ends = (("acc", share, *share_interval(share, 0.0, n)), ("delta_acc", lost.value, lost.lo, lost.hi))
        for metric, value, lo, hi in ends:
            place = {"split": "items", "language": language, "metric": metric}
            rows.append(place | {"value": value, "lo": lo, "hi": hi, "n": n, "status": "ok"})
    return rows


def conditions(sets: pd.DataFrame, arms: pd.DataFrame) -> str:
    """What was rounded, what was protected, and within how many bytes, in one line."""
    first, budget = sets.iloc[0], arms.iloc[0]
    return (
        f"{first['model']}: {first['low']}, one scale a row; protected units {first['high']}; "
        f"budget {budget['budget']} = {int(budget['budget_nbytes']):,} bytes"
    )


def _frame(table: Any, rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[column.name for column in table.columns])


def read_sets(model: str, plans: Iterable[str], units: Units, *, low: str, high: str) -> pd.DataFrame:
    """SETS: the plans that were read, and their bytes."""
    rows = []
    for plan in plans:
        each = units.parse(plan)
        nbytes = units.nbytes(each)
        place = {"model": model, "plan": plan, "size": len(each), "low": low, "high": high, "nbytes": nbytes}
        rows.append(place | {"matrices_nbytes": nbytes - units.rest, "weights": units.weights})
    return _frame(SETS, rows)
