"""Evolve: the precision of every component, found by evolution on real text -> EVOLUTION and the champion's map.

A genome gives each component (`bitalloc.precision`: embeddings, attention and MLP of each block) a precision; the final
norm stays in FP32. Genomes are put on the model in place and read windows of the select split, more of them from stage
to stage; report windows are read by champions alone and choose nothing. Every score is kept in the store, and what is
drawn depends on the seed alone, so a run that was killed repeats its generations from the store within seconds and
loses the genome that was being read.

Legend: W_OI a matrix of O outputs and I inputs, h_ND hidden states of N positions; G genes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitalloc import config, precision, search
from bitalloc.config import parse_bytes
from bitalloc.errors import BitallocError
from bitalloc.models import Checkpoint, load_model, set_weight
from bitalloc.option import Option
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant.absmax import absmax
from bitalloc.search import Genome, Space
from bitalloc.store import Ledger, Store, digest
from bitalloc.strategies import Instance
from bitalloc.strategies.optimal import solve
from bitalloc.suites import Head, Windows, intervals
from bitalloc.tables import EVOLUTION

FIXED = "fp32"  # of the final norm
State = Mapping[str, str]  # layer -> what its weights are; layers that are not named are as in the checkpoint


def fitness(compression: float, degradation: float, penalty: float = 10.0) -> float:
    """baseline_bytes / bytes - penalty x degradation; the baseline has 16 bits everywhere.

    Published: 248.9 MB / 141.1 MB, PPL 30.00 against 28.48.

    >>> round(fitness(248.9 / 141.1, degradation(math.log(30.00), math.log(28.48))), 3)
    1.23
    """
    return compression - penalty * degradation


def degradation(nll: float, reference: float) -> float:
    """max(0, (ppl - ppl0) / ppl0), ppl = e^nll. A KL against 0 stands for the loss that it costs on average."""
    with np.errstate(over="ignore"):
        return float(max(0.0, np.expm1(nll - reference)))


class Measured:
    """Scores of a genome over windows: means over all scored tokens, nats a token."""

    def __init__(self, windows: pd.DataFrame) -> None:
        """`windows`: nll, nll_reference and kl of each, its `tokens` and its `corpus`."""
        self.windows, tokens = windows, windows["tokens"]
        self.nll, self.reference, self.kl = (
            float(windows[name] @ tokens / tokens.sum()) for name in ("nll", "nll_reference", "kl")
        )

    def loss(self, resamples: int = 2000) -> intervals.Interval:
        """nll - nll_reference, with its interval over windows."""
        windows = self.windows
        each = windows["nll"] - windows["nll_reference"]
        return intervals.mean(each, windows["tokens"], windows["corpus"], resamples=resamples, seed=0)


class Bench:
    """One model whose weights are exchanged in place, read in segments of windows; every reading is kept."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weight: Callable[[str, str], torch.Tensor],
        *,
        identity: Any,
        segments: Sequence[pd.DataFrame],
        store: Store,
        device: torch.device,
        batch: int = 8,
        remote_code: bool = False,
    ) -> None:
        """`weight(layer, what)` gives W_OI, `identity` is all that it depends on; `segments` are rows of TOKENS."""
        self.checkpoint, self.weight, self.device, self.remote_code = checkpoint, weight, device, remote_code
        self.segments = [Windows(frame, batch=batch, device=device) for frame in segments]
        read = [[np.asarray(tokens).tolist() for tokens in frame["tokens"]] for frame in segments]
        code = source_digest("bitalloc.suites.scoring", "bitalloc.models")
        self.ledger = Ledger(store, digest(["evolve", code, identity, read, device.type, batch]))
        self.now: dict[str, str] = {}
        self.read = 0  # genomes that were read, not found
        self._reference: dict[int, list[torch.Tensor]] = {}

    @cached_property
    def model(self) -> Any:
        return load_model(self.checkpoint.path, device=self.device, remote_code=self.remote_code)

    @cached_property
    def head(self) -> Head:
        return Head(self.model)

    @cached_property
    def reference_head(self) -> Head:
        self.put_on({})
        return self.head.fixed()

    def put_on(self, state: State) -> None:
        """Give the model these weights, touching only those that differ from what it has."""
        changed = [layer for layer in {**self.now, **state} if self.now.get(layer) != state.get(layer)]
        for layer in changed:
            what = state.get(layer)
            W_OI = self.checkpoint.weight(layer) if what is None else self.weight(layer, what)
            set_weight(self.model, self.checkpoint.family, layer, W_OI)
        self.now = dict(state)
        if changed:
            self.head.refresh()

    def reference(self, segment: int) -> list[torch.Tensor]:
        """h_ND of the unquantised model, in memory."""
        if segment not in self._reference:
            self.put_on({})
            self._reference[segment] = [h_ND.cpu() for h_ND in self.segments[segment].hidden(self.model)]
        return self._reference[segment]

    def measure(self, state: State, segments: Sequence[int]) -> Measured:
        """Raises `BitallocError` when a score is NaN or Inf."""
        return Measured(pd.concat([self._segment(state, segment) for segment in segments], ignore_index=True))

    def _segment(self, state: State, segment: int) -> pd.DataFrame:
        key = digest([sorted(state.items()), segment])
        if key not in self.ledger.records:
            before, reference_head, windows = self.reference(segment), self.reference_head, self.segments[segment]
            self.put_on(state)
            scores = windows.scores(self.head, windows.hidden(self.model), before, reference_head)
            if not np.isfinite(scores.to_numpy()).all():
                raise BitallocError(
                    "a genome makes the model's scores NaN or Inf, so it has no fitness: " + json.dumps(_first(state))
                )
            kept = ("nll", "nll_reference", "kl", "tokens")
            self.ledger.add({key: {name: scores[name].tolist() for name in kept}})
            self.read += 1
        return pd.DataFrame(self.ledger.records[key]).assign(corpus=self.segments[segment].frame["corpus"])


def _first(state: State) -> dict[str, str]:
    return dict(list(state.items())[:3])


class Genomes:
    """What genes and levels stand for: components, and precisions by rising bits; FP32 alone for the final norm."""

    def __init__(self, inventory: pd.DataFrame, precisions: Sequence[str], budget: int | None = None) -> None:
        """`budget`: bytes of the whole checkpoint. Raises `BitallocError` when the smallest genome takes more."""
        layer = precision.rounded(inventory).set_index("tensor")["layer"]
        parts = precision.components(inventory)
        self.layers = {name: [layer[tensor] for tensor in held if tensor in layer] for name, held in parts.items()}
        rising = sorted(set(precisions), key=lambda name: precision.BITS[name])
        self.levels = {name: rising if layers else [FIXED] for name, layers in self.layers.items()}
        lowest = {name: levels[0] for name, levels in self.levels.items()}
        self.floor = precision.nbytes(inventory, lowest)
        self.baseline = precision.nbytes(inventory, dict.fromkeys(lowest, precision.HALF))
        if budget is not None and budget < self.floor:
            raise BitallocError(
                f"evolve.budget of {budget:,} bytes is below the {self.floor:,} of the smallest genome; raise it or "
                "offer fewer bits in evolve.precisions"
            )
        size: dict[Any, int] = {}  # by shapes, which most blocks share
        added = []
        for name, levels in self.levels.items():
            held = inventory[inventory["tensor"].isin(parts[name])]
            shapes = tuple(held[["rows", "columns", "claimed"]].itertuples(index=False, name=None))
            for level in levels:
                if (shapes, level) not in size:
                    size[shapes, level] = precision.nbytes(held, {name: level})
            added.append([size[shapes, level] - size[shapes, levels[0]] for level in levels])
        self.space = Space(added, None if budget is None else budget - self.floor)

    def nbytes(self, level_G: Genome) -> int:
        """Bytes of the whole checkpoint, a tied head once."""
        return self.floor + self.space.size(level_G)

    def mapping(self, level_G: Genome) -> dict[str, str]:
        """Component -> precision."""
        return {name: levels[level] for (name, levels), level in zip(self.levels.items(), level_G, strict=True)}

    def genome(self, mapping: Mapping[str, str]) -> Genome:
        return np.array([levels.index(mapping[name]) for name, levels in self.levels.items()])

    def state(self, level_G: Genome) -> dict[str, str]:
        """Layer -> precision."""
        mapping = self.mapping(level_G)
        return {layer: mapping[name] for name, layers in self.layers.items() for layer in layers}

    def uniform(self, rng: np.random.Generator) -> Genome:
        """All components alike: at the bits nearest to 16; with a budget at the most that fit, the rest filled."""
        rising = [np.minimum(level, self.space.top_G) for level in range(self.space.top_G.max() + 1)]
        if self.space.budget is None:
            bits = [max(precision.BITS[p] for p in self.state(level_G).values()) for level_G in rising]
            return rising[int(np.argmin(np.abs(np.array(bits) - 16)))]
        return self.space.fill([g for g in rising if self.space.size(g) <= self.space.budget][-1], rng)

    def instance(self, cost: Callable[[Genome], float]) -> Instance:
        """The additive problem: what a component costs when it alone is below its highest precision."""
        size_GL = [row_L[: top + 1] for row_L, top in zip(self.space.nbytes_GL, self.space.top_G, strict=True)]
        costs_GL = np.full((len(size_GL), self.space.top_G.max() + 1), np.inf)
        nbytes_GL = np.zeros(costs_GL.shape, dtype=np.int64)
        for g, sizes in enumerate(size_GL):
            nbytes_GL[g, : len(sizes)] = sizes
            costs_GL[g, len(sizes) - 1] = 0.0
            for level in range(len(sizes) - 1):
                level_G = self.space.top_G.copy()
                level_G[g] = level
                costs_GL[g, level] = max(0.0, cost(level_G))
        named = tuple(Option(f"level-{level}", 0, 0, 0) for level in range(costs_GL.shape[1]))
        return Instance(tuple(self.levels), named, np.maximum(1, nbytes_GL.max(axis=1)), nbytes_GL, costs_GL)


def weights(checkpoint: Checkpoint) -> Callable[[str, str], torch.Tensor]:
    """(layer, precision) -> W_OI, as `bitalloc.precision` stores it; FP32 is the checkpoint's own."""

    def weight(layer: str, level: str) -> torch.Tensor:
        W_OI = checkpoint.weight(layer)
        if level == "fp32":
            return W_OI
        if level == precision.HALF:
            return W_OI.half().float()
        return absmax(W_OI, precision.option(level, W_OI.shape[1])).dequantize()

    return weight


class Search:
    """Genomes, the bench that reads them, and what their scores are worth."""

    def __init__(self, genomes: Genomes, bench: Bench, reach: Sequence[int], settings: config.Evolve) -> None:
        """`reach[s]`: segments of the bench that stage s reads."""
        self.genomes, self.bench, self.reach, self.settings = genomes, bench, reach, settings
        self.progress: Progress | None = None

    def measure(self, level_G: Genome, stage: int = -1) -> Measured:
        return self.bench.measure(self.genomes.state(level_G), range(self.reach[stage]))

    def fitness(self, level_G: Genome, stage: int = -1) -> float:
        """With a budget the bytes are given, and compression is no part of it."""
        found = self.measure(level_G, stage)
        lost = degradation(found.kl, 0.0) if self.settings.fitness == "kl" else degradation(found.nll, found.reference)
        if self.genomes.space.budget is not None:
            return -lost
        return fitness(self.genomes.baseline / self.genomes.nbytes(level_G), lost, self.settings.penalty)

    def score(self, genomes: Sequence[Genome], stage: int) -> list[float]:
        found = []
        for level_G in genomes:
            before = self.bench.read
            found.append(self.fitness(level_G, stage))
            if self.progress:
                self.progress.advance(cached=before == self.bench.read)
        return found

    def optimal(self) -> Genome:
        """The additive optimum from KL of single components: within the budget, else of the best fitness predicted."""
        instance = self.genomes.instance(lambda level_G: self.measure(level_G).kl)
        if (budget := self.genomes.space.budget) is not None:
            return solve(instance, min(budget, instance.most)).choice_N
        budgets = np.linspace(instance.least, instance.most, 64).astype(np.int64)
        plans = [solve(instance, int(budget)).choice_N for budget in budgets]
        return max(
            plans,
            key=lambda plan: fitness(
                self.genomes.baseline / self.genomes.nbytes(plan),
                degradation(instance.objective(plan), 0.0),
                self.settings.penalty,
            ),
        )

    def run(self, seed: int) -> Iterator[search.Generation]:
        """Generations of one seed; raises `BitallocError` when there is nowhere to go from the start."""
        settings, index = self.settings, 0
        if settings.start == "optimal":
            start_G = self.optimal()
        else:
            start_G = self.genomes.uniform(np.random.default_rng([seed, 0]))
        for generation in search.evolve(
            self.genomes.space,
            start_G,
            self.score,
            generations=settings.generations,
            offspring=settings.offspring,
            survivors=[survivors for _, survivors in settings.stages],
            switches=settings.switches,
            seed=seed,
        ):
            index = generation.index
            yield generation
        if index == 0:
            raise BitallocError(
                "the genome that evolve starts from has no legal neighbour; offer more evolve.precisions or another "
                "evolve.budget"
            )
        if index < settings.generations:
            print(f"[evolve] seed {seed}: nothing new is left to try after generation {index}", file=sys.stderr)


def segments(tokens: pd.DataFrame, stages: Sequence[tuple[int, int]]) -> tuple[list[pd.DataFrame], list[int]]:
    """(windows that each stage reads beyond the one before, how many of these segments each stage reaches).

    Windows of the select split, a corpus after the other in turn; a stage that asks for more than there is reads all.

    >>> tokens = pd.DataFrame({"split": "select", "corpus": "a", "window": range(4), "tokens": [[1, 2, 3]] * 4})
    >>> parts, reach = segments(tokens, [(3, 4), (7, 2), (99, 1)])
    >>> [list(part["window"]) for part in parts], reach
    ([[0], [1, 2], [3]], [1, 2, 3])
    """
    whole = tokens[tokens["split"] == "select"].sort_values(["window", "corpus"], kind="stable", ignore_index=True)
    if whole.empty:
        raise BitallocError("there are no windows of the split select: set retrieve.select_windows above 0")
    read = whole["tokens"].map(len).cumsum().to_numpy()
    ends = [min(len(whole), int(np.searchsorted(read, count)) + 1) for count, _ in stages]
    cuts = sorted({0, *ends})
    return [whole[a:b] for a, b in pairwise(cuts)], [cuts.index(end) for end in ends]


def evolve(
    *,
    checkpoint: Checkpoint,
    inventory: pd.DataFrame,
    tokens: pd.DataFrame,
    settings: config.Evolve,
    store: Store,
    device: torch.device,
    batch: int = 8,
    seed: int = 0,
    remote_code: bool = False,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """EVOLUTION of all seeds, and component -> precision of the fittest champion.

    Raises `BitallocError` for a budget that nothing fits, a start without legal neighbours, scores that are NaN or Inf.
    """
    budget = None if settings.budget is None else parse_bytes(settings.budget)
    genomes = Genomes(inventory, settings.precisions, budget)
    parts, reach = segments(tokens, settings.stages)
    bench = Bench(
        checkpoint,
        weights(checkpoint),
        identity=[sorted(inventory["digest"]), source_digest("bitalloc.precision", "bitalloc.quant.absmax")],
        segments=[*parts, tokens[tokens["split"] == "report"]],
        store=store,
        device=device,
        batch=batch,
        remote_code=remote_code,
    )
    running = Search(genomes, bench, reach, settings)
    each = settings.offspring + sum(survivors for _, survivors in settings.stages[:-1])
    running.progress = Progress("evolve", settings.seeds * (1 + settings.generations * each), unit="readings")
    rows: list[dict[str, Any]] = []
    for offset in range(settings.seeds):
        before: dict[str, str] = {}
        for generation in running.run(seed + offset):
            mapping = genomes.mapping(generation.champion_G)
            rows.append({"seed": seed + offset} | _row(running, generation, mapping, before))
            before = mapping
            print(f"[evolve] {told(rows[-1])}", file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows)[EVOLUTION.names]
    best = frame.loc[frame["fitness"].idxmax(), "champion"]
    return frame, precision.parse(json.loads(best), genomes.levels)


def _row(
    running: Search, generation: search.Generation, mapping: Mapping[str, str], before: Mapping[str, str]
) -> dict[str, Any]:
    genomes, champion_G = running.genomes, generation.champion_G
    found = running.measure(champion_G)
    held_out = running.bench.measure(genomes.state(champion_G), [len(running.bench.segments) - 1])
    loss, nbytes = held_out.loss(), genomes.nbytes(champion_G)
    changed = [f"{name} {before[name]} to {new}" for name, new in mapping.items() if before.get(name, new) != new]
    return {
        "generation": generation.index,
        "champion": json.dumps(precision.compact(mapping)),
        "fitness": generation.fitness,
        "nbytes": nbytes,
        "compression": genomes.baseline / nbytes,
        "ppl": math.exp(found.nll),
        "reference_ppl": math.exp(found.reference),
        "kl_nats_per_token": found.kl,
        "report_ppl": math.exp(held_out.nll),
        "report_reference_ppl": math.exp(held_out.reference),
        "report_loss_nats_per_token": loss.value,
        "report_loss_lo": loss.lo,
        "report_loss_hi": loss.hi,
        "report_kl_nats_per_token": held_out.kl,
        "changed": ", ".join(changed),
        "evaluations": generation.evaluations,
    }


def told(row: Mapping[str, Any]) -> str:
    """A row of EVOLUTION in a line."""
    changed = f": {row['changed']}" if row["changed"] else ""
    return (
        f"seed {row['seed']}, generation {row['generation']}: fitness {row['fitness']:.4f}, {row['compression']:.3f}x, "
        f"PPL {row['ppl']:.3f} of {row['reference_ppl']:.3f}{changed}"
    )
