"""Evaluate: what every plan does to the model, by every suite -> EVALUATE and, item by item, RESPONSES.

The weights of one model are exchanged in place, only those that differ from the plan before, so a random
pool needs no checkpoints; a plan that has one is loaded from it. Every answer is kept (`suites.scoring.Memory`), and
before anything is scored it is said what there is to do and how long that takes.

Legend: W_OI a matrix of O outputs and I inputs, h_ND hidden states of N positions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import bdtrc

from bitalloc import config, cost
from bitalloc.cost import NAMED, POOL, Work
from bitalloc.errors import BitallocError, nearest
from bitalloc.experiments import Experiments
from bitalloc.formats import bitalloc as checkpoints
from bitalloc.models import load_model, set_weight
from bitalloc.option import Option, from_row
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant import CompressedMatrix
from bitalloc.store import Store, digest
from bitalloc.suites import SUITES, Head, Memory, Scored, Windows, divergence, downstream, intervals, world
from bitalloc.suites.scoring import compare, hidden, windows_place
from bitalloc.suites.subsets import order
from bitalloc.tables import CHECKPOINTS, EVALUATE, PLAN, RESPONSES

REFERENCE, RERUN = "reference", "reference-rerun"
_OF_WINDOWS = ("perplexity", "divergence", "protocols")  # suites that read the same tokens in one pass
_SETTLED_S = 2.0  # seconds that a pass may take that measures the rate
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
    """A plan as the bench sees it: the identity of each weight that departs from the reference, and its source.

    `pool`: a random plan, which is asked fewer items. `batch`: windows a forward pass where they are not those of the
    configuration. `wall_s`: seconds to compute each weight that is not kept in the store.
    """

    weights: Mapping[str, str]
    matrix: Callable[[str], CompressedMatrix] | None = None
    pool: bool = False
    batch: int | None = None
    wall_s: Mapping[str, float] = field(default_factory=dict)


def evaluate(
    *,
    plans: Mapping[str, pd.DataFrame | Path],
    experiments: Experiments,
    tokens: pd.DataFrame,
    items: pd.DataFrame,
    split: str,
    settings: config.Evaluate,
    store: Store | None = None,
    suites: Sequence[str] | None = None,
    seed: int = 0,
    remote_code: bool = False,
    pool: Collection[str] = (),
    rerun: bool = False,
    part: tuple[int, int] = (0, 1),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(EVALUATE, RESPONSES) of the reference and of every plan: a PLAN frame, or the folder of its checkpoint.

    `experiments` knows the model; answers are kept in its store, or in `store`. `suites` overrides `settings.suites`.
    Plans of the `pool` are asked the subset of `settings.pool_points`. `rerun`: the reference a second time, in other
    batches. `part` (k, n): of the plans only each n-th, from the k-th on; the estimate is of all. Raises
    `BitallocError` for an unknown suite, a plan that is not one of this model, scores that are not finite, and an
    estimate above the ceiling.
    """
    bench = open_bench(
        experiments=experiments,
        tokens=tokens,
        items=items,
        split=split,
        settings=settings,
        store=store,
        suites=suites,
        seed=seed,
        remote_code=remote_code,
    )
    first, parts = part
    subjects = bench.subjects(plans, pool=pool, rerun=rerun)
    mine = [REFERENCE, *([RERUN] if rerun and not first else []), *list(plans)[first::parts]]
    works = {name: bench.works(subject) for name, subject in subjects.items()}
    table = bench.cost(subjects, works)
    if not first:
        said = f"[evaluate] {len(subjects)} plans on {bench.device.type}\n{cost.told(table)}"
        print(said, file=sys.stderr, flush=True)
    points = settings.pool_points if any(subject.pool for subject in subjects.values()) else None
    cost.check(table, ceiling_hours=settings.ceiling_hours, points=points)

    left = sum(work.tokens - work.stored for name in mine for work in works[name])
    progress = Progress("evaluate", left, unit="tokens")
    bench.expect({name: subjects[name] for name in mine})
    rows, statistics, protocols, chances = [], [], {}, {}
    for name in mine:
        progress.note = name
        record = bench.measure(name, subjects[name], works[name], progress)
        rows.append(record["rows"].assign(plan=name))
        statistics.append(record["statistics"].assign(plan=name))
        protocols |= {(name, *place): protocol for place, protocol in record["protocols"].items()}
        chances |= record["chances"]
    responses = pd.concat(rows, ignore_index=True)[RESPONSES.names]
    whole = pd.concat(statistics, ignore_index=True)
    return summarise(responses, protocols, chances, whole, resamples=settings.resamples, seed=seed), responses


def sources(plans: Iterable[str], inputs: Mapping[str, Path]) -> dict[str, pd.DataFrame | Path]:
    """Plans as `evaluate` takes them: a checkpoint where the table `checkpoints` has one, else PLAN from `folder`."""
    written: Mapping[str, str] = {}
    if "checkpoints" in inputs:
        written = CHECKPOINTS.read(inputs["checkpoints"]).set_index("plan")["path"].to_dict()
    return {
        name: inputs["checkpoints"].parent / written[name]
        if name in written
        else PLAN.read(inputs["folder"] / f"{name}.parquet")
        for name in plans
    }


def estimate(
    *, plans: Mapping[str, pd.DataFrame | Path], pool: Collection[str] = (), rerun: bool = False, **given: Any
) -> pd.DataFrame:
    """COST of what `evaluate` would do; nothing is scored but the few batches that tell the rate."""
    bench = open_bench(**given)
    subjects = bench.subjects(plans, pool=pool, rerun=rerun)
    return bench.cost(subjects, {name: bench.works(subject) for name, subject in subjects.items()})


def open_bench(
    *,
    experiments: Experiments,
    tokens: pd.DataFrame,
    split: str,
    settings: config.Evaluate,
    suites: Sequence[str] | None = None,
    remote_code: bool = False,
    **given: Any,
) -> Bench:
    """The bench of these suites over the windows of `split`; arguments as those of `evaluate`."""
    names = list(suites or settings.suites)
    for name in names:
        if name not in SUITES:
            raise BitallocError(f"unknown suite {name!r} in evaluate.suites: {nearest(name, SUITES)}")
    chosen = tokens[tokens["split"] == split]
    windows = Windows(chosen, batch=settings.batch, device=experiments.device, stride=settings.stride)
    given |= {"suites": names, "settings": settings, "remote_code": remote_code}
    return Bench(experiments=experiments, windows=windows, **given)


class Bench:
    """One model whose weights are exchanged in place, and what is scored on it. It is loaded when it is needed."""

    def __init__(
        self,
        *,
        experiments: Experiments,
        windows: Windows,
        items: pd.DataFrame,
        suites: list[str],
        remote_code: bool,
        settings: config.Evaluate = config.Evaluate(),  # noqa: B008 - frozen
        store: Store | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.seed, self.experiments = settings, seed, experiments
        self.path, self.inventory = experiments.checkpoint.path, experiments.inventory
        self.store = experiments.store if store is None else store
        self.windows, self.items, self.suites = windows, items, suites
        self.device, self.remote_code = windows.device, remote_code
        self.claimed = list(self.inventory.loc[self.inventory["claimed"], "layer"])
        self.tables = list(experiments.tables)
        self._shards: dict[tuple[str, Option], tuple[str, float]] = {}
        self.now: Mapping[str, str] = {}  # identities of the weights that the model has now
        self._wanted: set[int] = set()  # windows that somebody will compare with the reference
        self._reference: dict[int, torch.Tensor] = {}
        self._others: dict[int, Windows] = {}
        self._fixed: Head | None = None

    @cached_property
    def model(self) -> Any:
        return load_model(self.path, device=self.device, remote_code=self.remote_code)

    @cached_property
    def head(self) -> Head:
        return Head(self.model)

    @property
    def reference_head(self) -> Head | None:
        """A copy of the unquantised head where plans may exchange it."""
        if self._fixed is None and self.tables:
            self.put_on(Subject({}))
            self._fixed = self.head.fixed()
        return self._fixed

    @cached_property
    def harness(self) -> downstream.Harness:
        """The tasks of suite downstream, their prompts made once for all plans."""
        return downstream.Harness(self.model, self.head, path=self.path, settings=self.settings, seed=self.seed)

    # ---- plans
    def subjects(
        self, plans: Mapping[str, pd.DataFrame | Path], *, pool: Collection[str] = (), rerun: bool = False
    ) -> dict[str, Subject]:
        """The reference, its rerun if asked for, and every plan."""
        found = {REFERENCE: Subject({})}
        if rerun:
            found[RERUN] = Subject({}, batch=max(1, self.settings.batch // 2) if self.settings.batch > 1 else 2)
        return found | {name: self.subject(name, plan, pool=name in pool) for name, plan in plans.items()}

    def subject(self, name: str, plan: pd.DataFrame | Path, *, pool: bool = False) -> Subject:
        """What a plan does to the weights; raises `BitallocError` when it does not fit the model."""
        if isinstance(plan, Path):
            frame, matrix = checkpoints.load(plan, inventory=self.inventory)
            self._admit(name, frame)
            written = [checkpoints.checkpoint_digest(plan), source_digest("bitalloc.formats.bitalloc")]
            return Subject({layer: digest([*written, layer]) for layer in frame["layer"]}, matrix, pool)
        self._admit(name, plan)
        options = {row["layer"]: from_row(row, self.experiments.sweep) for row in plan.to_dict("records")}
        shards = {layer: self._shard(layer, option) for layer, option in options.items()}
        return Subject(
            {layer: key for layer, (key, _) in shards.items()},
            lambda layer: self.experiments.matrix(layer, options[layer]),
            pool,
            wall_s={} if self.experiments.keep else {layer: wall_s for layer, (_, wall_s) in shards.items()},
        )

    def _admit(self, name: str, plan: pd.DataFrame) -> None:
        known = {*self.tables, *self.experiments.digests} - set(self.claimed)
        if off := sorted(set(plan["layer"]) - known ^ set(self.claimed)):
            raise BitallocError(f"plan {name} is not one of this model: {off[0]} is missing or unknown; rerun allocate")
        self.tables += sorted(set(plan["layer"]) - {*self.claimed, *self.tables})

    def _shard(self, layer: str, option: Option) -> tuple[str, float]:
        if (layer, option) not in self._shards:
            if layer in self.tables or self.experiments.free(layer, option):
                self._shards[layer, option] = self.experiments.shard(layer, option), 0.0
            else:
                row = self.experiments.rows([layer], [option]).iloc[0]
                self._shards[layer, option] = row["key"], row["wall_s"]
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

    # ---- what is to be read
    def memory(self, subject: Subject, progress: Progress | None = None) -> Memory:
        """What this plan has answered, in this run or another."""
        code = source_digest("bitalloc.suites.world", "bitalloc.models", "bitalloc.quant")
        weights = [checkpoints.source_identity(self.inventory), sorted(subject.weights.items())]
        batch = [] if subject.batch is None else ["rerun", subject.batch]
        return Memory(self.store, [code, self.device.type, digest(weights), *batch], progress)

    def windows_of(self, subject: Subject) -> Windows:
        """The windows, in the batches of this plan."""
        if subject.batch is None:
            return self.windows
        if subject.batch not in self._others:
            settings = {"batch": subject.batch, "device": self.device, "stride": self.settings.stride}
            self._others[subject.batch] = Windows(self.windows.frame, **settings)
        return self._others[subject.batch]

    def limit(self, subject: Subject) -> int | None:
        """Items of a task that a plan is asked at most."""
        if not subject.pool or self.settings.pool_points is None:
            return None
        return cost.needed(self.settings.pool_points, self.settings.pool_discordant)

    def items_of(self, subject: Subject) -> pd.DataFrame:
        """The items of suite world that a plan is asked: each task's first `limit` of a drawn order."""
        limit = self.limit(subject)
        if limit is None or self.items.empty:
            return self.items
        parts = (
            part.iloc[sorted(order(part["group"].tolist(), f"{self.seed} {task}")[:limit])]
            for task, part in self.items.groupby("task", sort=False)
        )
        return pd.concat(parts).sort_index()

    @property
    def place(self) -> list[Any] | None:
        """Where in the memory of a plan the scores of windows lie; None where no suite reads them."""
        if not set(_OF_WINDOWS).intersection(self.suites):
            return None
        return windows_place(divergence="divergence" in self.suites)

    def works(self, subject: Subject) -> list[Work]:
        """What a plan has to read, and how much of it the store has."""
        memory, found = self.memory(subject), []
        if self.place:
            known = memory.known(self.place)
            sizes = [len(reading.tokens) for reading in self.windows.readings]
            task = self.windows.frame["corpus"] + "/" + self.windows.frame.get("protocol", self.windows.frame["split"])
            for name, places in task.groupby(task, sort=False).groups.items():
                stored = sum(sizes[at] for at in places if self.windows.keys[at] in known)
                found.append(Work("windows", str(name), len(places), sum(sizes[at] for at in places), stored))
        if "world" in self.suites and not self.items.empty:
            for name, part in self.items_of(subject).groupby("task", sort=False):
                known, sizes = memory.known(world.place(str(name))), world.sizes(part)
                stored = sum(size for size, key in zip(sizes, world.keys(part), strict=True) if key in known)
                found.append(Work("world", str(name), len(part), sum(sizes), stored))
        if "downstream" in self.suites:
            found += self.harness.works(memory, self.limit(subject))
        return found

    def cost(self, subjects: Mapping[str, Subject], works: Mapping[str, list[Work]]) -> pd.DataFrame:
        """COST of these plans, one after the other."""
        told, before = [], Subject({})
        for name, subject in subjects.items():
            role = POOL if subject.pool else NAMED
            told += [(role, work) for work in works[name]]
            if any(work.stored < work.tokens for work in works[name]):
                anew = [layer for layer in subject.wall_s if subject.weights[layer] != before.weights.get(layer)]
                if anew:
                    seconds = sum(subject.wall_s[layer] for layer in anew)
                    told.append((role, Work("weights", "recomputed", len(anew), seconds=seconds)))
                before = subject
        rates = self.rates() if any(work.stored < work.tokens for _, work in told) else {}
        return cost.estimate(told, rates)

    @torch.inference_mode()
    def rates(self) -> dict[bool, float]:
        """Tokens a second that the model reads (False) and writes (True, one a pass), within seconds."""
        self.put_on(Subject({}))
        (one,), several = self.windows.some([0]), self.windows.batches[-1]

        def seconds(work: Callable[[], torch.Tensor]) -> float:
            start = time.perf_counter()
            work().cpu()  # which waits for the device
            return time.perf_counter() - start

        def read(batch: Any) -> torch.Tensor:
            h_ND = hidden(self.model, batch)
            return compare(self.head, batch, h_ND, h_ND if "divergence" in self.suites else None)["nll"]

        read(one)  # the first pass chooses its kernels
        spent, batch = seconds(lambda: read(one)), one
        if spent * len(several.tokens_BT) < _SETTLED_S:
            spent, batch = seconds(lambda: read(several)), several
        ids_B1 = several.tokens_BT[:, :1]
        step = seconds(lambda: self.model.base_model(input_ids=ids_B1, use_cache=False).last_hidden_state)
        return {False: batch.tokens_BT.numel() / spent, True: len(ids_B1) / step}

    # ---- scoring
    def expect(self, subjects: Mapping[str, Subject]) -> None:
        """These plans will be scored: the windows that the store lacks are those that the reference is needed for."""
        if "divergence" in self.suites and self.place:
            for subject in subjects.values():
                known = self.memory(subject).known(self.place)
                self._wanted |= {at for at, key in enumerate(self.windows.keys) if key not in known}

    def reference(self) -> dict[int, torch.Tensor]:
        """Final hidden states of the unquantised model for each window that is wanted, in memory.

        They are read in the batches of all windows, whichever are wanted: a run that was resumed has the same.
        """
        if not self._wanted <= self._reference.keys():
            self.put_on(Subject({}))
            for batch in self.windows.batches:
                with torch.inference_mode():
                    if self._wanted.intersection(batch.owner_N.tolist()):
                        self._reference |= batch.parted(hidden(self.model, batch).cpu())
        return self._reference

    def measure(
        self, name: str, subject: Subject, works: Sequence[Work], progress: Progress | None = None
    ) -> dict[str, Any]:
        """`rows` of RESPONSES and `statistics` of EVALUATE (what tokens alone tell), without `plan`; `protocols` by
        suite and task, `chances` by suite, task and metric.
        """
        windows, fresh = self.windows_of(subject), any(work.stored < work.tokens for work in works)
        reference = reference_head = None
        if "divergence" in self.suites:
            unread = any(work.suite == "windows" and work.stored < work.tokens for work in works)
            reference = self.reference() if unread else {}
            reference_head = self.reference_head if unread else None
        if fresh:
            self.put_on(subject)  # after what needs the reference's weights
        scored = Scored(
            self.model if fresh else None,
            self.head if fresh else None,
            windows,
            self.items_of(subject),
            reference,
            reference if windows is self.windows and not subject.weights else None,
            reference_head,
            harness=self.harness if "downstream" in self.suites else None,
            memory=self.memory(subject, progress),
            limit=self.limit(subject),
        )
        frames, protocols = [], {}
        try:
            for suite in self.suites:
                rows, by_task = SUITES[suite](scored)
                frames.append(rows)
                protocols |= {(suite, task): protocol for task, protocol in by_task.items()}
        except FloatingPointError:
            raise BitallocError(
                f"plan {name} makes the model's scores NaN or Inf; leave it out or rerun its sweep"
            ) from None
        for work in works if subject.pool else ():
            every = (self.items["task"] == work.task).sum() if work.suite == "world" else 0
            if work.items < every:
                protocols["world", work.task] += f"; {work.items} of {every} items, drawn by seed {self.seed}"
        whole, chances = pd.concat(frames), {}
        if "chance" in whole:
            guessed = whole.dropna(subset="chance").groupby(["suite", "task", "metric"])["chance"].mean()
            chances = {tuple(place): float(chance) for place, chance in guessed.items()}
            whole = whole.drop(columns="chance")
        told = divergence.statistics(scored) if "divergence" in self.suites else pd.DataFrame()
        return {"rows": whole, "statistics": told, "protocols": protocols, "chances": chances}


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
    groups = every.groupby(["plan", "suite", "task", "metric"], sort=False)
    progress = Progress("evaluate", groups.ngroups, unit="intervals")
    for (plan, suite, task, metric), part in groups:
        progress.advance(note=plan)
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
        lucky = chance > 0 and bdtrc(part["value"].sum() - 1, len(part), chance) > (1 - intervals.COVERAGE) / 2
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
    return frame[EVALUATE.names]
