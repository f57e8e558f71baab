"""Profile: how fast a model reads and writes at each precision, and how much memory that takes -> RECORDS.

Every variant is resident in a process of its own and the same work goes round, one generation each in an order drawn
anew, so that what the machine does beside hits all alike. A generation reads B prompts of L random tokens and writes N
each, greedily, whatever ends a text. Clocks: CUDA events, or wall time on a CPU. Medians over generations, quartiles,
and a bootstrap's 95 % interval of the median (Efron and Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.models import context_length, read_config
from bitalloc.profile.generation import Generation
from bitalloc.profile.processes import OutOfMemory, Remote, Server
from bitalloc.profile.records import OK, Row, machine
from bitalloc.profile.variants import Variant, libraries
from bitalloc.progress import Progress
from bitalloc.suites import intervals

NO_MEMORY = "out of memory"
TIMED = (
    "ttft_ms", "tpot_ms", "itl_ms", "latency_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "prefill_speedup",
    "decode_speedup",
)  # fmt: skip
COST = {
    "usd_per_million_input_tokens": "prefill_tokens_per_s",
    "usd_per_million_output_tokens": "decode_tokens_per_s",
}


def usd_per_million_tokens(usd_per_hour: float | None, tokens_per_s: float, utilisation: float = 1.0) -> float:
    """usd_per_hour 10^6 / (3600 tokens_per_s utilisation); raises `BitallocError` where the price is not known.

    >>> usd_per_million_tokens(3.6, tokens_per_s=500, utilisation=0.5)
    4.0
    >>> usd_per_million_tokens(None, 500)
    Traceback (most recent call last):
        ...
    bitalloc.errors.BitallocError: no cost without a price: give usd_per_hour, its source and date in profile.prices
    """
    if usd_per_hour is None:
        raise BitallocError("no cost without a price: give usd_per_hour, its source and date in profile.prices")
    return usd_per_hour * 1e6 / (3600 * tokens_per_s * utilisation)


@dataclass(frozen=True)
class Cell:
    """One batch at one length."""

    batch: int
    length: int

    def within(self, other: Cell) -> bool:
        """It needs no more memory than the other."""
        return self.batch <= other.batch and self.length <= other.length


class Holders:
    """The processes that hold variants; those that are not needed are ended first."""

    def __init__(self, server: Server, variants: Sequence[Variant], seed: int, compiled: bool) -> None:
        self._server, self._variants = server, {variant.name: variant for variant in variants}
        self._given, self._remotes = (seed, compiled), dict[str, Remote]()
        self.facts: dict[str, tuple[dict[str, Any], dict[str, float | None]]] = {}
        self.cold: dict[str, tuple[Cell, Generation]] = {}  # the very first generation of each

    def need(self, names: Sequence[str]) -> dict[str, Remote]:
        for name in [name for name in self._remotes if name not in names]:
            self.end(name)
        for name in names:
            if name not in self._remotes:
                remote = self._server.start("bitalloc.profile.generation:Holder", self._variants[name], *self._given)
                self._remotes[name] = remote
                self.facts.setdefault(name, remote.call("facts"))
        return {name: self._remotes[name] for name in names}

    def end(self, name: str) -> None:
        if remote := self._remotes.pop(name, None):
            remote.close()

    def generate(self, name: str, cell: Cell, new: int) -> Generation:
        found = self._remotes[name].call("generate", cell.batch, cell.length, new)
        self.cold.setdefault(name, (cell, found))
        return found


def rounds(
    names: Sequence[str],
    generate: Callable[[str], Generation],
    settings: config.Profile,
    rng: np.random.Generator,
) -> dict[str, list[Generation]]:
    """Generations of every variant, as many of each, round by round in an order drawn anew.

    After `warmup` rounds that do not count it goes on until each has `iterations` of them that took `seconds` together.
    """
    for _ in range(settings.warmup):
        for name in names:
            generate(name)
    found: dict[str, list[Generation]] = {name: [] for name in names}
    spent_s = dict.fromkeys(names, 0.0)
    while any(len(found[name]) < settings.iterations or spent_s[name] < settings.seconds for name in names):
        for name in rng.permutation(list(names)):
            one = generate(str(name))
            found[str(name)].append(one)
            spent_s[str(name)] += one.first_s + sum(one.gaps_s)
    return found


def profile(
    variants: Sequence[Variant],
    *,
    model: str,
    settings: config.Profile,
    run_id: str,
    revision: str | None = None,
    seed: int = 0,
    notes: str = "",
) -> list[Row]:
    """Rows of RECORDS for every variant, batch and length; where something could not be had the status says why.

    Speedups are over the first variant. When all variants do not fit side by side, each has its turn alone, and its
    notes say so.
    """
    if settings.priced_as is not None:  # before an hour is spent
        usd_per_million_tokens(settings.prices[settings.priced_as].usd_per_hour, 1.0)
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise BitallocError(f"profile.variants names {max(names, key=names.count)!r} twice; remove one")
    with Server("bitalloc.profile.variants:prepare", *libraries(variants)) as server:
        bench = Bench(server, variants, settings, seed)
        bench.measure()
    shared = {"run_id": run_id, "stage": "profile", "model": model, "revision": revision, "seed": seed, "notes": notes}
    return list(bench.rows({**shared, **machine(variants[0].device)}))


@dataclass
class Result:
    """What came of one variant in one cell."""

    status: str = OK
    generations: Sequence[Generation] = ()
    alone: bool = False
    memory_status: str = OK
    memory: Mapping[str, float | None] | None = None


class Bench:
    """Variants, cells, and what came of them."""

    def __init__(self, server: Server, variants: Sequence[Variant], settings: config.Profile, seed: int) -> None:
        self._server, self._settings, self._seed = server, settings, seed
        self._variants = {variant.name: variant for variant in variants}
        self._holders = Holders(server, variants, seed, settings.compile)
        self._refused: dict[str, str] = {}  # variant -> why it does not run here
        self._results: dict[tuple[str, Cell], Result] = {}
        longest = context_length(read_config(variants[0].source))
        for batch in sorted(set(settings.batches)):
            for length in sorted(set(settings.lengths)):
                status = OK
                if longest is not None and length + settings.new_tokens > longest:
                    status = f"{length} + {settings.new_tokens} tokens are more than the model's context of {longest}"
                for name in self._variants:
                    self._results[name, Cell(batch, length)] = Result(status)
        self._cells = list(dict.fromkeys(cell for _, cell in self._results))

    def measure(self) -> None:
        names = list(self._variants)
        fitting = [cell for cell in self._cells if self._results[names[0], cell].status == OK]
        progress = Progress("profile", 2 * len(names) * len(fitting), unit="cells")
        for name in names:
            try:
                self._holders.need([name])
            except (BitallocError, OutOfMemory) as reason:
                self._refused[name] = f"{NO_MEMORY}: {reason}" if isinstance(reason, OutOfMemory) else str(reason)
        for cell in fitting:
            self._time(cell)
            progress.advance(len(names), note=f"timing, batch {cell.batch}, {cell.length} tokens")
        self._holders.need([])
        for name in names:
            for cell in fitting:
                self._peaks(name, cell)
                progress.advance(note=f"memory of {name}, batch {cell.batch}, {cell.length} tokens")

    def _time(self, cell: Cell) -> None:
        """All variants in turns; where they do not fit side by side, one after the other."""
        left = []
        for name in self._variants:
            if before := self._failed_within(name, cell):
                at = f"batch {before.batch}, {before.length} tokens"
                self._results[name, cell].status = f"not tried: {NO_MEMORY} at {at}"
            elif name not in self._refused:
                left.append(name)
        if not left or self._turns(left, cell) or len(left) == 1:
            return
        fit = [name for name in left if self._turns([name], cell, alone=True)]
        if 1 < len(fit) < len(left):  # it may have been one that needs more than the others
            self._turns(fit, cell)

    def _failed_within(self, name: str, cell: Cell) -> Cell | None:
        """A cell that needs no more than this one and had not the memory."""
        for (of, other), result in self._results.items():
            if of == name and result.status.startswith(NO_MEMORY) and other.within(cell):
                return other
        return None

    def _turns(self, names: Sequence[str], cell: Cell, *, alone: bool = False) -> bool:
        """Time these variants; False where they have not the memory."""
        new, rng = self._settings.new_tokens, np.random.default_rng([self._seed, cell.batch, cell.length])
        try:
            self._holders.need(names)
            found = rounds(names, lambda name: self._holders.generate(name, cell, new), self._settings, rng)
        except OutOfMemory as reason:
            for name in names:
                self._holders.end(name)  # what is left of it is not to be trusted
            if len(names) == 1:
                self._results[names[0], cell].status = f"{NO_MEMORY}: {reason}"
            return False
        for name, generations in found.items():
            self._results[name, cell].generations, self._results[name, cell].alone = generations, alone
        return True

    def _peaks(self, name: str, cell: Cell) -> None:
        """From a process that does nothing else."""
        result = self._results[name, cell]
        result.memory_status = self._refused.get(name, result.status)
        if result.memory_status != OK:
            return
        try:
            remote = self._server.start("bitalloc.profile.generation:Holder", self._variants[name], self._seed, False)
            result.memory = remote.call("memory", cell.batch, cell.length, self._settings.new_tokens)
            remote.close()
        except OutOfMemory as reason:
            result.memory_status = f"{NO_MEMORY}: {reason}"

    # ---- rows
    def rows(self, shared: Row) -> Iterator[Row]:
        for name in self._variants:
            facts, whole = self._holders.facts.get(name, ({"simulated": False}, {}))
            of = {**shared, "variant": name, **facts}
            for metric in ("nbytes", "load_s", "libraries_mem_mb", "load_mem_mb", "load_reserved_mb"):
                yield of | _one(metric, whole.get(metric), self._refused.get(name, OK))
            yield from self._cold(name, of)
            for cell in self._cells:
                at = {"batch": cell.batch, "prompt_length": cell.length, "gen_len": self._settings.new_tokens}
                yield from self._cell(name, cell, {**of, **at})

    def _cold(self, name: str, of: Row) -> Iterator[Row]:
        """The first generation of all, and what compiling added to it."""
        at, status, first_ms, compile_s = dict(of), self._refused.get(name, OK), None, None
        if cold := self._holders.cold.get(name):
            cell, one = cold
            at |= {"batch": cell.batch, "prompt_length": cell.length, "gen_len": self._settings.new_tokens}
            first_ms = one.metrics()["ttft_ms"]
            later = [each.metrics()["latency_ms"] for each in self._results[name, cell].generations]
            if self._settings.compile and later:
                compile_s = (one.metrics()["latency_ms"] - float(np.median(later))) / 1e3
        yield at | _one("cold_ttft_ms", first_ms, status)
        off = status == OK and not self._settings.compile
        yield at | _one("compile_s", compile_s, "profile.compile is off" if off else status)

    def _cell(self, name: str, cell: Cell, at: Row) -> Iterator[Row]:
        settings, result = self._settings, self._results[name, cell]
        first = next(iter(self._variants))
        if result.alone:
            at["notes"] = f"{at['notes']}; timed alone: the variants do not fit side by side".removeprefix("; ")
        status = self._refused.get(name, result.status)
        beside = None if name == first or result.alone else self._results[first, cell]
        timed, spreads = _timed(result.generations, beside.generations if beside else ()), {}
        for metric in TIMED:
            spread = spreads[metric] = _spread(timed.get(metric), settings, at["seed"])
            why = status
            if status == OK and metric.endswith("speedup"):
                why = "this is the first variant" if name == first else "not timed beside the first variant"
            yield at | {"metric": metric, **spread, "status": why if spread["value"] is None else OK}
        for metric, rate in COST.items():
            yield at | _cost(metric, spreads[rate], settings, status, at["notes"])
        for metric in (f"{phase}_{kind}_mb" for phase in ("prefill", "decode") for kind in ("mem", "reserved")):
            yield at | _one(metric, (result.memory or {}).get(metric), self._refused.get(name, result.memory_status))


def _one(metric: str, value: float | None, status: str) -> Row:
    """One number without a spread, or why there is none."""
    if value is None and status == OK:
        status = "only a GPU has it" if metric.endswith("reserved_mb") else "not to be had on this system"
    return {"metric": metric, "value": value, "n": None if value is None else 1, "status": status}


def _timed(each: Sequence[Generation], first: Sequence[Generation]) -> dict[str, list[float]]:
    """Metric -> one value a generation; speedups, round by round, where the first variant was timed beside."""
    own = [one.metrics() for one in each]
    found = {metric: [one[metric] for one in own] for metric in own[0]} if own else {}
    for before, one in zip([one.metrics() for one in first], own, strict=True) if first and own else ():
        for metric, over in (("prefill_speedup", "ttft_ms"), ("decode_speedup", "tpot_ms")):
            found.setdefault(metric, []).append(before[over] / one[over])
    return found


def _spread(values: Sequence[float] | None, settings: config.Profile, seed: int) -> Row:
    """Median, its interval, quartiles; None where nothing was measured."""
    if not values:
        return dict.fromkeys(("value", "lo", "hi", "q25", "q75", "n"))
    at = intervals.median(values, ["all"] * len(values), resamples=settings.resamples, seed=seed)
    q25, q75 = (float(end) for end in np.quantile(values, [0.25, 0.75]))
    return {"value": at.value, "lo": at.lo, "hi": at.hi, "q25": q25, "q75": q75, "n": len(values)}


def _cost(metric: str, rate: Row, settings: config.Profile, status: str, notes: str) -> Row:
    """What a million tokens cost at a rate: dearer where it is lower."""
    if settings.priced_as is None or rate["value"] is None:
        why = "no price was asked: profile.priced_as is null" if status == OK else status
        return {"metric": metric, **dict.fromkeys(rate), "status": why}
    price = settings.prices[settings.priced_as]
    usd = {
        name: usd_per_million_tokens(price.usd_per_hour, rate[other], settings.utilisation)
        for name, other in (("value", "value"), ("lo", "hi"), ("hi", "lo"), ("q25", "q75"), ("q75", "q25"))
    }
    said = f"{settings.priced_as} at USD {price.usd_per_hour:g} an hour ({price.source}, {price.date}), utilisation "
    told = "; ".join(part for part in (notes, f"{said}{settings.utilisation:g}") if part)
    return {"metric": metric, **usd, "n": rate["n"], "status": OK, "notes": told}
