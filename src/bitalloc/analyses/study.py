"""What the analyses share: who was asked what, strata of equal bytes, one resampling of each set of items, the rows.

Shapes: P plans, I items (or windows), R bootstrap resamples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bitalloc.config import Analyze
from bitalloc.errors import BitallocError
from bitalloc.statistics import (
    Estimate,
    Scores,
    accuracies,
    benjamini_hochberg,
    holm,
    mean_interval,
    resample,
    split_items,
    units_drawn,
)
from bitalloc.statistics.intervals import PSEUDO_ITEMS
from bitalloc.tables import FREE, GOODHART

NLL, KL, ACC, TOP1 = "nll_nats_per_token", "kl_nats_per_token", "acc", "top1"
REFERENCE, RERUN = "reference", "reference-rerun"
UNIFORM, BEST, POOL, COMPONENT, LEAKED = "uniform", "best", "random", "component", "leaked"
APART = (COMPONENT, LEAKED, *FREE)  # they serve one analysis each, or none
ALL = "all"
MIN_PLANS = 8  # fewer cannot place a rank correlation anywhere
SATURATED = 0.01  # accuracy within which all plans equal the reference
CHUNK = 1 << 22  # resampled weights held at once


@dataclass(frozen=True)
class Sample:
    """Scores of some items, and these items drawn R times."""

    scores: Scores
    counts_RI: np.ndarray
    units: int  # drawn: items, or clusters

    def means(self, plans: Sequence[str]) -> np.ndarray:
        return self.scores.means(plans)

    def resampled(self, plans: Sequence[str]) -> np.ndarray:
        """Means of the plans in every resample, means_RP."""
        return self._every[:, [self.scores.plans.index(plan) for plan in plans]]

    @functools.cached_property
    def _every(self) -> np.ndarray:
        return self.draw(self.scores.values_PI)

    def draw(self, values_KI: np.ndarray) -> np.ndarray:
        """Weighted mean over items of each row in every resample, means_RK."""
        step = max(1, CHUNK // self.counts_RI.shape[1])
        parts = []
        for first in range(0, len(self.counts_RI), step):
            weights_RI = self.counts_RI[first : first + step] * self.scores.weight_I
            parts.append(weights_RI @ values_KI.T / weights_RI.sum(1, keepdims=True))
        return np.concatenate(parts)

    def difference(self, plan: str, other: str) -> Estimate:
        """Mean of `plan` less that of `other`, paired over items."""
        value = float(np.subtract(*self.means([plan, other])))
        value_R = np.subtract(*self.resampled([plan, other]).T)
        return mean_interval(value, value_R, self.units, self.extra if plan != other else 0.0)

    @functools.cached_property
    def extra(self) -> float:
        """Variance of one pseudo-item a side in the mean of a difference, where items are right or wrong."""
        values_PI = self.scores.values_PI
        binary = np.isin(values_PI[np.isfinite(values_PI)], (0.0, 1.0)).all()
        return PSEUDO_ITEMS / self.n**2 if binary else 0.0

    @property
    def n(self) -> int:
        return len(self.scores.weight_I)


@dataclass(frozen=True)
class Proxy:
    """What plans are selected by, the lower the better: a mean over samples, or a number that each plan comes with."""

    samples: tuple[Sample, ...] = ()
    given: pd.Series | None = None

    def means(self, plans: Sequence[str]) -> np.ndarray:
        if self.given is not None:
            return self.given.loc[list(plans)].to_numpy(dtype=float)
        return np.mean([sample.means(plans) for sample in self.samples], axis=0)

    def resampled(self, plans: Sequence[str], resamples: int) -> np.ndarray:
        """Of every resample; the same in all where nothing was sampled."""
        if self.given is not None:
            return np.broadcast_to(self.means(plans), (resamples, len(plans)))
        return np.mean([sample.resampled(plans) for sample in self.samples], axis=0)


class Study:
    """Collects the rows of GOODHART. One resampling of a set of items serves every analysis of it.

    Analyses of named plans take all their items; those of a pool the items that its plans have in common.
    """

    def __init__(
        self, plans: pd.DataFrame, evaluate: pd.DataFrame, responses: pd.DataFrame, settings: Analyze, seed: int
    ) -> None:
        self.settings, self.seed, self.rows = settings, seed, []
        self.floors, few = _floors(evaluate), set(plans.loc[plans["strategy"].isin([POOL, *APART]), "plan"]) | {RERUN}
        self.nll, self.tasks = scores(responses, NLL, few), scores(accuracies(responses), ACC, few)
        if not self.nll:
            raise BitallocError(f"responses hold no {NLL} of the report split: add the suite perplexity to evaluate")
        self.golds = self.tasks or scores(responses, TOP1, few)
        kl = {f"kl:{name}": each for name, each in scores(responses, KL, few).items()}
        self.sets = {f"nll:{name}": each for name, each in self.nll.items()} | kl | self.golds
        measured = set.intersection(*(set(each.plans) for each in self.sets.values()))
        self.plans = plans[plans["plan"].isin(measured)]
        if self.plans.empty:
            raise BitallocError("no plan has responses in every suite: run evaluate before analyze")
        inside = self.plans[~self.plans["strategy"].isin(APART)]
        # the winner is a copy of another plan, a tuned one has its map: of equal maps one counts
        distinct = inside.drop_duplicates(["budget", "nbytes", "objective"])
        self.strata = {str(budget): part["plan"].tolist() for budget, part in distinct.groupby("budget", sort=False)}
        self.named = inside[inside["strategy"] != POOL]
        self._samples: dict[tuple[str, bytes], Sample] = {}
        self._status: dict[tuple[str, str], str] = {}
        pooled = [name for names in self.strata.values() for name in names]
        self.pooled = {name: self.sample(name, pooled) for name in self.sets}
        told = self.plans[~self.plans["strategy"].isin(FREE)].drop_duplicates("plan")  # of the others it is unknown
        objective = told.set_index("plan")["objective"]
        self.proxies = {name: Proxy((self.pooled[name],)) for name in self.sets if name.startswith("nll:")}
        if kl:
            self.proxies["kl"] = Proxy(tuple(self.pooled[name] for name in kl))
        if objective.notna().all():
            self.proxies["objective"] = Proxy(given=objective)
        self.perplexity = next(iter(self.proxies))  # of the first corpus: what one would select by

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])

    def sample(self, name: str, plans: Sequence[str]) -> Sample:
        """The items of a set that all of `plans` (and the reference) were asked, resampled once for all who ask."""
        whole = self.sets[name]
        plans = [*plans, *([REFERENCE] if REFERENCE in whole.plans else [])]
        shared = whole.shared(plans)
        if shared.values_PI.shape[1] == 0:
            raise BitallocError(f"responses: the plans have no item of {name} in common; rerun evaluate")
        key = (name, np.isfinite(whole.of(plans)).all(0).tobytes())
        if key not in self._samples:
            # a byte a count: 14,000 items x 2,000 resamples fit in memory
            counts_RI = resample(shared.group_I, self.settings.resamples, self.rng(name), np.uint8)
            self._samples[key] = Sample(shared, counts_RI, units_drawn(shared.group_I))
        return self._samples[key]

    def halves(self, name: str, sample: Sample) -> np.ndarray:
        return split_items(sample.scores.group_I, self.settings.folds, self.rng(f"folds {name}"))

    def pool(self, budget: str) -> list[str]:
        """The random plans of a stratum."""
        random = set(self.plans.loc[self.plans["strategy"] == POOL, "plan"])
        return [name for name in self.strata[budget] if name in random]

    def pairs(self) -> Iterator[tuple[str, Proxy, str, Sample]]:
        """Every proxy with every gold."""
        for (proxy, values), gold in itertools.product(self.proxies.items(), self.golds):
            yield proxy, values, gold, self.pooled[gold]

    def plan_of(self, strategy: str) -> pd.Series:
        """Budget -> the plan of that strategy."""
        found = self.plans[self.plans["strategy"] == strategy].drop_duplicates("budget")
        return found.set_index("budget")["plan"]

    def drawn(self, budget: str, plans: int, *, of: str = "plans") -> np.ndarray:
        """Bootstrap of the plans of a stratum, drawn_RP, the same whatever is asked of it."""
        return self.rng(f"{of} {budget}").integers(plans, size=(self.settings.resamples, plans))

    def add(self, analysis: str, statistic: str, value: float, **row: Any) -> None:
        """A row. `p` enters the correction of its `family`; what else is missing is so in the table."""
        blank = {"lo": np.nan, "hi": np.nan, "p_adjusted": np.nan, "p": np.nan, "family": analysis}
        status = self.status(str(row["gold"]), str(row["budget"]))
        self.rows.append(
            {**blank, "status": status, "analysis": analysis, "statistic": statistic, "value": value, **row}
        )

    def add_estimate(self, analysis: str, statistic: str, found: Estimate, scale: float = 1.0, **row: Any) -> None:
        value, *ends = (scale * each for each in (found.value, found.lo, found.hi))
        self.add(analysis, statistic, value, lo=min(ends), hi=max(ends), **row)

    def status(self, gold: str, budget: str) -> str:
        """ok, floor: the reference is not above chance, or saturated: all plans of the stratum are as good as it."""
        place = (gold, budget if budget in self.strata else ALL)
        if place not in self._status:
            self._status[place] = self._judge(*place)
        return self._status[place]

    def _judge(self, gold: str, budget: str) -> str:
        if gold in self.floors:
            return "floor"
        if gold not in self.golds:
            return "ok"
        task = self.pooled[gold]
        names = list(itertools.chain(*self.strata.values())) if budget == ALL else self.strata[budget]
        reference = task.means([REFERENCE])[0] if REFERENCE in task.scores.plans else 1.0
        return "saturated" if np.abs(task.means(names) - reference).max() <= SATURATED else "ok"

    def frame(self) -> pd.DataFrame:
        """GOODHART: Holm over each family of declared tests, Benjamini and Hochberg over every other."""
        for family in dict.fromkeys(row["family"] for row in self.rows):
            members = [row for row in self.rows if row["family"] == family and np.isfinite(row["p"])]
            adjust = holm if family.startswith("declared") else benjamini_hochberg
            for row, adjusted in zip(members, adjust([row["p"] for row in members]), strict=True):
                row["p_adjusted"] = adjusted
        return pd.DataFrame(self.rows)[GOODHART.names]


Analysis = Callable[[Study], None]


def _floors(evaluate: pd.DataFrame) -> set[str]:
    """Tasks in which the reference is not above chance."""
    rows = accuracies(evaluate)
    return set(rows.loc[(rows["plan"] == REFERENCE) & (rows["status"] == "floor"), "task"])


def scores(responses: pd.DataFrame, metric: str, few: set[str]) -> dict[str, Scores]:
    """Task, or corpus without its split, -> responses of one metric on the report split, paired over plans.

    An item of lm-eval that failed with one plan is left out with all; plans in `few` may have been asked less.
    """
    found = {}
    rows = responses[(responses["metric"] == metric) & ~responses["task"].str.endswith("/select")]
    for task, part in rows.groupby("task", sort=False):
        table = part.pivot(index="plan", columns="item", values="value")
        whole_I = table[~table.index.isin(few)].notna().all(axis=0)
        if not whole_I.all() and (part["suite"] == "downstream").all():
            table = table.loc[:, whole_I]
            whole_I = whole_I[whole_I]
        if table.empty or not whole_I.all():
            raise BitallocError(
                f"responses: some plans lack items of {task} ({metric}), so they cannot be paired; rerun evaluate"
            )
        items = part.drop_duplicates("item").set_index("item").loc[table.columns]
        found[str(task).removesuffix("/report")] = Scores(
            plans=tuple(table.index),
            values_PI=table.to_numpy(),
            weight_I=items["weight"].to_numpy(dtype=float),
            group_I=pd.factorize(items["group"])[0],
        )
    return found
