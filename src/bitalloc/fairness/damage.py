"""What plans cost each language on aligned sentences: every metric with its formula, one bootstrap for all.

Legend: L languages, I aligned sentences, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bitalloc.errors import BitallocError
from bitalloc.statistics import MIN_CLUSTERS, Estimate, mean_interval, resample, units_drawn

NONE, REFERENCE, ALL = "none", "reference", "all"
ENGLISH = "en"
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
