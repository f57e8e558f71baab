"""Evaluate: what every plan does to the model, by every suite -> EVALUATE and, item by item, RESPONSES.

The weights of one model are exchanged in place, only those that differ from the plan before, so a random
pool needs no checkpoints; a plan that has one is loaded from it. Every finished plan is a shard.

Legend: W_OI a matrix of O outputs and I inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom

from bitalloc import config
from bitalloc.errors import BitallocError, nearest
from bitalloc.experiments import Experiments
from bitalloc.formats import bitalloc as checkpoints
from bitalloc.models import load_model, set_weight
from bitalloc.option import Option, from_row
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant import CompressedMatrix
from bitalloc.store import JSON, Store, digest
from bitalloc.suites import SUITES, Head, Scored, Windows, divergence, downstream, intervals
from bitalloc.tables import EVALUATE, RESPONSES

REFERENCE = "reference"
_LOSS = "nll_nats_per_token"  # its median over windows is told too
# what follows from the mean of a metric, by which function
_DERIVED = {
    _LOSS: ("ppl", np.exp),
    "nats_per_word": ("word_perplexity", np.exp),
    "nats_per_byte": ("byte_perplexity", np.exp),
    divergence.DELTA_P2: ("delta_p_rms", np.sqrt),
}


@dataclass(frozen=True)
class Subject:
    """A plan as the bench sees it: the identity of each weight that departs from the reference, and its source."""

    weights: Mapping[str, str]
    matrix: Callable[[str], CompressedMatrix] | None = None


def evaluate(
    *,
    plans: Mapping[str, pd.DataFrame | Path],
    path: Path,
    inventory: pd.DataFrame,
    experiments: Experiments,
    tokens: pd.DataFrame,
    items: pd.DataFrame,
    split: str,
    settings: config.Evaluate,
    store: Store,
    device: torch.device,
    suites: Sequence[str] | None = None,
    seed: int = 0,
    remote_code: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(EVALUATE, RESPONSES) of the reference and of every plan: a PLAN frame, or the folder of its checkpoint.

    `path` is the unquantised model, `suites` overrides `settings.suites`. Raises `BitallocError` for an unknown
    suite, a plan that is not one of this model, and scores that are not finite.
    """
    names = list(suites or settings.suites)
    for name in names:
        if name not in SUITES:
            raise BitallocError(f"unknown suite {name!r} in evaluate.suites: {nearest(name, SUITES)}")
    windows = Windows(tokens[tokens["split"] == split], batch=settings.batch, device=device, stride=settings.stride)
    bench = Bench(
        path=path,
        inventory=inventory,
        experiments=experiments,
        windows=windows,
        items=items,
        suites=names,
        remote_code=remote_code,
        settings=settings,
        store=store,
        seed=seed,
    )
    progress = Progress("evaluate", len(plans) + 1, unit="plans")
    rows, statistics, protocols, chances = [], [], {}, {}
    for name, plan in {REFERENCE: None, **plans}.items():
        subject = bench.subject(name, plan)
        key = digest({"stage": "evaluate", "bench": bench.fingerprint, "weights": dict(subject.weights)})
        record = store.get(key)
        cached = record is not None
        if not cached:
            record = bench.measure(name, subject)
            store.put(key, record)
        progress.advance(cached=cached, note=name)
        rows.append(pd.DataFrame({"plan": name, **record["rows"]}))
        statistics.append(pd.DataFrame(record["statistics"]).assign(plan=name))
        protocols |= {(name, suite, task): protocol for suite, task, protocol in record["protocols"]}
        chances |= {tuple(place): chance for *place, chance in record["chances"]}
    responses = pd.concat(rows, ignore_index=True)[[column.name for column in RESPONSES.columns]]
    whole = pd.concat(statistics, ignore_index=True)
    return summarise(responses, protocols, chances, whole, resamples=settings.resamples, seed=seed), responses


class Bench:
    """One model whose weights are exchanged in place, and what is scored on it."""

    def __init__(
        self,
        *,
        path: Path,
        inventory: pd.DataFrame,
        experiments: Experiments,
        windows: Windows,
        items: pd.DataFrame,
        suites: list[str],
        remote_code: bool,
        settings: config.Evaluate = config.Evaluate(),  # noqa: B008 - frozen
        store: Store | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.store, self.seed = settings, store, seed
        self.path, self.inventory, self.experiments = path, inventory, experiments
        self.windows, self.items, self.suites = windows, items, suites
        self.device, self.remote_code = windows.device, remote_code
        self.claimed = list(inventory.loc[inventory["claimed"], "layer"])
        self.tables = list(experiments.tables)
        self._shards: dict[tuple[str, Option], str] = {}
        self.now: Mapping[str, str] = {}  # identities of the weights that the model has now

    @cached_property
    def fingerprint(self) -> str:
        """Everything but the plan that a score depends on."""
        settings = [self.windows.protocol, self.windows.budget, self.device.type, self.suites]
        if "downstream" in self.suites:
            settings += [downstream.fingerprint(self.settings.tasks), self.settings.batch, self.seed]
        data = [checkpoints.source_identity(self.inventory), *map(_frame_digest, (self.windows.frame, self.items))]
        return digest([source_digest("bitalloc.evaluate"), settings, data])

    @cached_property
    def model(self) -> Any:
        return load_model(self.path, device=self.device, remote_code=self.remote_code)

    @cached_property
    def head(self) -> Head:
        return Head(self.model)

    @cached_property
    def reference_head(self) -> Head | None:
        """A copy of the unquantised head where plans may exchange it."""
        if not self.tables:
            return None
        self.put_on(Subject({}))
        return self.head.fixed()

    @cached_property
    def harness(self) -> downstream.Harness | None:
        """The tasks of suite downstream, if there are any, their prompts made once for all plans."""
        if not ("downstream" in self.suites and self.settings.tasks and self.store):
            return None
        settings, seed = self.settings, self.seed
        return downstream.Harness(self.model, self.head, path=self.path, settings=settings, store=self.store, seed=seed)

    @cached_property
    def reference(self) -> list[torch.Tensor]:
        """Final hidden states of the unquantised model, h_ND of every batch, in memory."""
        self.put_on(Subject({}))
        return [h_ND.cpu() for h_ND in self.windows.hidden(self.model)]

    def subject(self, name: str, plan: pd.DataFrame | Path | None) -> Subject:
        """What a plan does to the weights; raises `BitallocError` when it does not fit the model."""
        if plan is None:
            return Subject({})
        if isinstance(plan, Path):
            frame, matrix = checkpoints.load(plan, inventory=self.inventory)
            self._check(name, frame)
            written = checkpoints.checkpoint_digest(plan)
            return Subject({layer: f"{written} {layer}" for layer in frame["layer"]}, matrix)
        self._check(name, plan)
        options = {row["layer"]: from_row(row, self.experiments.sweep) for row in plan.to_dict("records")}
        return Subject(
            {layer: self._shard(layer, option) for layer, option in options.items()},
            lambda layer: self.experiments.matrix(layer, options[layer]),
        )

    def _check(self, name: str, plan: pd.DataFrame) -> None:
        if off := sorted(set(plan["layer"]).difference(self.tables) ^ set(self.claimed)):
            raise BitallocError(f"plan {name} is not one of this model: {off[0]} is missing or unknown; rerun allocate")

    def _shard(self, layer: str, option: Option) -> str:
        if (layer, option) not in self._shards:
            self._shards[layer, option] = self.experiments.shard(layer, option)
        return self._shards[layer, option]

    def put_on(self, subject: Subject) -> None:
        """Give the model the weights of a plan, touching only those that differ from what it has."""
        family = self.experiments.checkpoint.family
        for layer in (*self.claimed, *self.tables):
            wanted = subject.weights.get(layer)
            if wanted != self.now.get(layer):
                known = wanted is not None and subject.matrix is not None
                W_OI = subject.matrix(layer).dequantize() if known else self.experiments.checkpoint.weight(layer)
                set_weight(self.model, family, layer, W_OI)
        if any(subject.weights.get(layer) != self.now.get(layer) for layer in self.tables):
            self.head.refresh()
        self.now = subject.weights

    def measure(self, name: str, subject: Subject) -> JSON:
        """Rows of RESPONSES and of EVALUATE (what tokens alone tell) without `plan`, column by column, and
        (suite, task, protocol) triples.
        """
        reference, reference_head = (
            (self.reference, self.reference_head) if "divergence" in self.suites else (None, None)
        )
        self.put_on(subject)
        own = None if subject.weights else reference
        identity = digest([checkpoints.source_identity(self.inventory), dict(subject.weights)])
        scored = Scored(
            self.model,
            self.head,
            self.windows,
            self.items,
            reference,
            own,
            reference_head,
            harness=self.harness,
            identity=identity,
        )
        frames, protocols = [], []
        for suite in self.suites:
            rows, by_task = SUITES[suite](scored)
            frames.append(rows)
            protocols += [[suite, task, protocol] for task, protocol in by_task.items()]
        whole = pd.concat(frames)
        if not np.isfinite(whole["value"]).all():
            raise BitallocError(f"plan {name} makes the model's scores NaN or Inf; leave it out or rerun its sweep")
        chances = []
        if "chance" in whole:
            guessed = whole.dropna(subset="chance").groupby(["suite", "task", "metric"])["chance"].mean()
            chances = [[*place, float(chance)] for place, chance in guessed.items()]
            whole = whole.drop(columns="chance")
        told = divergence.statistics(scored) if "divergence" in self.suites else pd.DataFrame()
        return {
            "rows": _columns(whole),
            "statistics": _columns(told),
            "protocols": protocols,
            "chances": chances,
        }


def summarise(
    responses: pd.DataFrame,
    protocols: Mapping[tuple[str, str, str], str],
    chances: Mapping[tuple[str, ...], float] = MappingProxyType({}),
    statistics: pd.DataFrame = pd.DataFrame(),  # noqa: B008 - nobody writes to it
    *,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """EVALUATE from RESPONSES: weighted means and what follows from them, median_nll over windows, flips of items,
    with intervals; and `statistics` of single tokens (plan, suite, task, metric, value, n), without.

    Metrics of lm-eval (`acc,none`) have its standard error beside them (`acc_stderr,none`). `chances`, by suite, task
    and metric, are the scores of guessing: a task is at the floor when the interval of the reference reaches down to
    its own, or when guessing gets as many right in more than 2.5 % of cases (binomial: of few items that all are right
    the bootstrap makes no interval).
    """
    draws = {"resamples": resamples, "seed": seed}
    rows, floors = [], set()
    every = pd.concat([responses, divergence.flips(responses, REFERENCE)])
    for (plan, suite, task, metric), part in every.groupby(["plan", "suite", "task", "metric"], sort=False):
        found = {metric: intervals.mean(part["value"], part["weight"], part["group"], **draws)}
        if metric in _DERIVED:
            mean, (name, function) = found[metric], _DERIVED[metric]
            found[name] = intervals.Interval(*function([mean.value, mean.lo, mean.hi]).tolist(), mean.n)
        if metric == _LOSS:
            found["median_nll"] = intervals.median(part["value"], part["group"], **draws)
        if suite == "downstream":
            error = intervals.standard_error(part["value"], part["group"])
            found[metric.replace(",", "_stderr,")] = intervals.Interval(error, np.nan, np.nan, len(part))
        chance = chances.get((suite, task, metric), np.nan)
        lucky = chance > 0 and binom.sf(part["value"].sum() - 1, len(part), chance) > (1 - intervals.COVERAGE) / 2
        if plan == REFERENCE and (found[metric].lo <= chance or lucky):
            floors.add((suite, task, metric))
        protocol = f"{protocols[plan, suite, task]}; 95 % percentile bootstrap, {resamples} resamples"
        place = {"plan": plan, "suite": suite, "task": task}
        rows += [{**place, "metric": name, **vars(found[name]), "protocol": protocol} for name in found]
    for row in statistics.to_dict("records"):
        protocol = f"{protocols[row['plan'], row['suite'], row['task']]}; over tokens, taken as independent"
        rows.append({**row, "lo": np.nan, "hi": np.nan, "protocol": protocol})
    order = {plan: place for place, plan in enumerate(dict.fromkeys(responses["plan"]))}
    rows.sort(key=lambda row: order[row["plan"]])
    frame = pd.DataFrame(rows)
    places = list(frame[["suite", "task", "metric"]].itertuples(index=False, name=None))
    frame["chance"] = [chances.get(place, np.nan) for place in places]
    frame["status"] = ["floor" if place in floors else "ok" for place in places]
    return frame[[column.name for column in EVALUATE.columns]]


def _columns(frame: pd.DataFrame) -> JSON:
    return {column: frame[column].tolist() for column in frame}


def _frame_digest(frame: pd.DataFrame) -> str:
    plain = frame.astype(object).map(_plain)
    return hashlib.sha256(plain.to_json(orient="split", index=False).encode()).hexdigest()


def _plain(cell: Any) -> Any:
    return [_plain(part) for part in cell] if isinstance(cell, list | tuple | np.ndarray) else cell
