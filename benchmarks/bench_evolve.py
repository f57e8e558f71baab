"""Evolution on text against DP, greedy, random and uniform: equal bytes, equal evaluations, five seeds, held-out text.

python benchmarks/bench_evolve.py [--model tiny] [--seeds 5]  ->  tables, and benchmarks/results/evolve.json

Needs the costs of results/MODEL (make demo). Every genome is read on the same tokens of the select split, KL to the
unquantised model; what wins is read on report windows, which choose nothing. DP and greedy see the KL of single
components, a table that takes as many readings as random and evolve have. Readings are kept: a run that was killed
goes on. Four parts: `small`, all genomes of eight components at two precisions, exhaustively; `components`, three
budgets; `matrices`, the plans of the pipeline (bits, group, rank of every matrix), polished; `weight`, other penalties.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitalloc import config, precision, search
from bitalloc.allocate import build
from bitalloc.budget import parse_budget
from bitalloc.config import Evolve
from bitalloc.evolve import Bench, Genomes, Measured, Search, weights
from bitalloc.experiments import open_experiments
from bitalloc.gates import read_verdict
from bitalloc.provenance import run_record, source_digest
from bitalloc.search import Genome, Space
from bitalloc.statistics import hypervolume
from bitalloc.strategies import STRATEGIES
from bitalloc.strategies.evolve import levels, nearest
from bitalloc.strategies.optimal import solve
from bitalloc.suites import intervals, spread
from bitalloc.tables import COSTS, SENSITIVITY, TOKENS

TOKENS_READ, REPORT_WINDOWS = 2048, 24
MORE = 8192  # tokens by which the plans of the pipeline are polished as well
OFFSPRING = 4
PRECISIONS = ["fp16", "int8", "int4", "int3", "int2"]
PENALTIES = (2.5, 10.0, 40.0)


class Reader:
    """A model of results/, its select and report windows, and the KL of any state of it."""

    def __init__(self, model: str) -> None:
        self.root = Path("results") / model
        sheet = config.load(Path("config/config.yaml"), Path("config/models.yaml"))
        self.config = sheet.for_model(model)
        files = {"checkpoint": "checkpoint.json", "inventory": "inventory.parquet", "moments": "moments.parquet"}
        self.experiments = open_experiments({part: self.root / file for part, file in files.items()}, self.config)
        self.inventory, self.store = self.experiments.inventory, self.experiments.store
        tokens = TOKENS.read(self.root / "tokens.parquet")
        each = len(tokens["tokens"].iloc[0])
        self.segments = [
            spread(tokens, TOKENS_READ // each, "select"),
            spread(tokens, REPORT_WINDOWS, "report"),
            spread(tokens, TOKENS_READ // each // 2, "select"),
            spread(tokens, MORE // each, "select"),
        ]

    def bench(self, weight: Callable[[str, str], torch.Tensor]) -> Bench:
        checkpoint = self.experiments.checkpoint
        code = source_digest("bitalloc.precision", "bitalloc.quant", "bitalloc.experiments")
        identity = ["benchmark", sorted(self.inventory["digest"]), code]
        shared = {"segments": self.segments, "store": self.store, "device": torch.device("cpu")}
        return Bench(checkpoint, weight, identity=identity, **shared)


def settings(**how: Any) -> Evolve:
    return Evolve(**{"fitness": "kl", "precisions": PRECISIONS, "offspring": OFFSPRING, "stages": [(1, 1)], **how})


def last(run: Iterator[search.Generation]) -> search.Generation:
    *_, found = run
    return found


def against(mine: Measured, other: Measured) -> dict[str, float]:
    """KL less that of another plan on the same windows, with its interval."""
    tokens, corpus = mine.windows["tokens"], mine.windows["corpus"]
    found = intervals.mean(mine.windows["kl"] - other.windows["kl"], tokens, corpus, resamples=2000, seed=0)
    return {"difference": found.value, "lo": found.lo, "hi": found.hi}


def small(reader: Reader, seeds: int) -> list[dict]:
    """Every genome of attention and MLP at 8 or 3 bits within half of the range of bytes, the rest at 8 bits."""
    genomes = Genomes(reader.inventory, ["int8", "int3"])
    bench = reader.bench(weights(reader.experiments.checkpoint))
    free = np.array([name.startswith("h.") for name in genomes.levels])
    sizes = [row_L[: top + 1] if moves else row_L[top : top + 1]
             for row_L, top, moves in zip(genomes.space.nbytes_GL, genomes.space.top_G, free, strict=True)]  # fmt: skip
    fixed = sum(int(size[0]) for size, moves in zip(sizes, free, strict=True) if not moves)
    widest = sum(int(size[-1]) for size in sizes)
    space = Space(sizes, fixed + (widest - fixed) // 2)
    read: set[bytes] = set()

    def kl(level_G: Genome) -> float:
        read.add(level_G.tobytes())
        whole_G = np.where(free, level_G, genomes.space.top_G)
        return bench.measure(genomes.state(whole_G), [2]).kl

    every = [np.array(levels) for levels in product(*(range(len(size)) for size in sizes))]
    costs = sorted((kl(level_G), level_G.tolist()) for level_G in every if space.size(level_G) <= space.budget)
    rank = {tuple(level_G): place for place, (_, level_G) in enumerate(costs)}
    top_G = space.top_G
    single = np.array(
        [kl(np.where(np.arange(len(top_G)) == g, 0, top_G)) if free[g] else 0.0 for g in range(len(top_G))]
    )
    additive = min(
        (level_G for level_G in every if space.size(level_G) <= space.budget), key=lambda g: single[g < top_G].sum()
    )
    rows = [
        {"strategy": "DP", "readings": int(free.sum()), "kl": kl(additive), "place": rank[tuple(additive.tolist())]}
    ]
    for seed in range(seeds):
        for name, start_G in (
            ("evolve", space.fill(top_G * 0, np.random.default_rng(seed))),
            ("DP + evolve", additive),
        ):
            read.clear()
            score = lambda some, _: [-kl(level_G) for level_G in some]  # noqa: E731
            how = {"generations": 10, "offspring": OFFSPRING, "seed": seed}
            found = last(search.evolve(space, start_G, score, **how))
            place = rank[tuple(found.champion_G.tolist())]
            rows.append({"strategy": name, "seed": seed, "readings": len(read), "kl": -found.fitness, "place": place})
    return [{"genomes": len(costs), "best_kl": costs[0][0], **row} for row in rows]


def components(reader: Reader, seeds: int) -> list[dict]:
    """Component by component at the bytes of all-INT3, all-INT4 and half-way."""
    bench, rows = reader.bench(weights(reader.experiments.checkpoint)), []
    whole = Genomes(reader.inventory, PRECISIONS)
    at = {level: whole.nbytes(whole.genome({n: p[0] if len(p) == 1 else level for n, p in whole.levels.items()}))
          for level in ("int3", "int4")}  # fmt: skip
    for budget in (at["int3"], (at["int3"] + at["int4"]) // 2, at["int4"]):
        genomes = Genomes(reader.inventory, PRECISIONS, budget)
        judge = Search(genomes, bench, [1], settings(budget=f"{budget}"))
        instance = genomes.instance(lambda level_G, judge=judge: judge.measure(level_G).kl)
        room, count = genomes.space.budget, 1 + sum(len(p) - 1 for p in genomes.levels.values())

        def kl(level_G: Genome, judge: Search = judge) -> float:
            return judge.measure(level_G).kl

        def scored(some: Sequence[Genome], _: int, kl: Callable[[Genome], float] = kl) -> list[float]:
            return [-kl(level_G) for level_G in some]

        def evolved(start_G: Genome, seed: int, readings: int, space: Space = genomes.space, scored=scored) -> Genome:
            how = {"generations": (readings - 1) // OFFSPRING, "offspring": OFFSPRING, "seed": seed}
            return last(search.evolve(space, start_G, scored, **how)).champion_G

        plain = max((np.minimum(level, genomes.space.top_G) for level in range(len(PRECISIONS))),
                    key=lambda g: (genomes.space.size(g) <= room) * genomes.space.size(g))  # fmt: skip
        best = solve(instance, room).choice_N
        plans = [
            ("uniform", 0, 1, plain),
            ("DP", 0, count, best),
            ("greedy", 0, count, STRATEGIES["greedy"](instance, room)),
        ]
        for seed in range(seeds):
            drawn = [STRATEGIES["random"](instance, room, seed=[seed, draw]) for draw in range(count)]
            start_G = genomes.uniform(np.random.default_rng([seed, 0]))
            plans += [
                ("random", seed, count, min(drawn, key=kl)),
                ("evolve", seed, count, evolved(start_G, seed, count)),
                ("evolve x2", seed, 2 * count, evolved(start_G, seed, 2 * count)),
                ("DP + evolve", seed, 2 * count, evolved(best, seed, count)),
            ]
            print(f"components: budget {budget:,}, seed {seed} done, {bench.read} read", flush=True)
        reference = bench.measure(genomes.state(best), [1])
        for name, seed, readings, level_G in plans:
            held = bench.measure(genomes.state(level_G), [1])
            rows.append({
                "budget": budget, "strategy": name, "seed": seed, "readings": readings,
                "nbytes": genomes.nbytes(level_G), "select_kl": kl(level_G), "report_kl": held.kl,
                **against(held, reference),
                "map": json.dumps(precision.compact(genomes.mapping(level_G))),
            })  # fmt: skip
    return rows


def matrices(reader: Reader, seeds: int, readings: int = 61) -> list[dict]:
    """The exact optimum of the pipeline's additive cost, polished by the KL that is measured."""
    rows: list[dict] = []
    costs = COSTS.read(reader.root / f"costs.{read_verdict(reader.root / 'gates/fit.json')['route']}.parquet")
    instance = build(costs, SENSITIVITY.read(reader.root / "sensitivity.parquet"), reader.inventory, reader.config)
    named = {option.name: option for option in instance.options}
    bench = reader.bench(lambda layer, what: reader.experiments.matrix(layer, named[what]).dequantize())
    offered = levels(instance)
    for text in reader.config.allocate.budgets:
        budget = parse_budget(text, instance, reader.inventory, reader.config.sweep, reader.config.format)
        choice_N = solve(instance, budget.nbytes).choice_N
        start_N = nearest(instance, offered, choice_N)
        space = Space([instance.nbytes_NK[i, options] for i, options in enumerate(offered)], budget.nbytes)

        def state(level_N: Genome) -> dict[str, str]:
            chosen = [instance.options[options[level]].name for options, level in zip(offered, level_N, strict=True)]
            return dict(zip(instance.layers, chosen, strict=True))

        before = bench.measure(state(start_N), [1])
        for read, place, seed in [(TOKENS_READ, 0, seed) for seed in range(seeds)] + [(MORE, 3, 0)]:

            def score(some: Sequence[Genome], _: int, place: int = place) -> list[float]:
                return [-bench.measure(state(level_N), [place]).kl for level_N in some]

            how = {"generations": (readings - 1) // OFFSPRING, "offspring": OFFSPRING, "switches": 1, "seed": seed}
            path = list(search.evolve(space, start_N, score, **how))
            held = bench.measure(state(path[-1].champion_G), [1])
            rows.append({
                "budget": text, "tokens": read, "seed": seed, "readings": path[-1].evaluations,
                "select_kl_before": -path[0].fitness, "select_kl": -path[-1].fitness,
                "report_kl_before": before.kl, "report_kl": held.kl, **against(held, before),
            })  # fmt: skip
            print(f"matrices: {text}, {read} tokens, seed {seed} done, {bench.read} read", flush=True)
    return rows


def weight(reader: Reader, readings: int = 73) -> list[dict]:
    """Fitness with other penalties, without a budget: each picks another point of the same front."""
    bench, rows = reader.bench(weights(reader.experiments.checkpoint)), []
    genomes = Genomes(reader.inventory, PRECISIONS)
    for loss, penalty in product(("ppl", "kl"), PENALTIES):
        how = settings(fitness=loss, penalty=penalty, generations=(readings - 1) // OFFSPRING, start="optimal")
        judge = Search(genomes, bench, [1], how)
        found = last(judge.run(0))
        select, held = (bench.measure(genomes.state(found.champion_G), [place]) for place in (0, 1))
        nbytes = genomes.nbytes(found.champion_G)
        rows.append({
            "fitness": loss, "penalty": penalty, "compression": genomes.baseline / nbytes, "nbytes": nbytes,
            "select_ppl_change": float(np.expm1(select.nll - select.reference)), "select_kl": select.kl,
            "report_ppl_change": float(np.expm1(held.nll - held.reference)), "report_kl": held.kl,
        })  # fmt: skip
        print(f"weight: {loss} {penalty:g} done, {bench.read} read", flush=True)
    return rows


def volumes(rows: list[dict]) -> dict[str, float]:
    """Hypervolume of (bytes, report KL) of each strategy over the budgets, mean over seeds, share of the whole."""
    frame = pd.DataFrame(rows)
    corner = frame["budget"].max() * 1.01, frame["report_kl"].max() * 1.01
    whole = corner[0] * corner[1]
    return {
        name: float(np.mean([hypervolume(part[["nbytes", "report_kl"]].to_numpy(), corner) / whole
                             for _, part in mine.groupby("seed")]))
        for name, mine in frame.groupby("strategy", sort=False)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["small", "components", "matrices", "weight"])
    asked = parser.parse_args()
    reader = Reader(asked.model)
    path = Path(__file__).parent / "results" / "evolve.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found["record"] = run_record("torch", "transformers", "numpy") | {"model": asked.model}
    for part in asked.parts:
        seeds = {"matrices": min(2, asked.seeds)}.get(part, asked.seeds)
        run = {"small": small, "components": components, "matrices": matrices}
        found[part] = weight(reader) if part == "weight" else run[part](reader, seeds)
        if part == "components":
            found["hypervolume"] = volumes(found[part])
        frame = pd.DataFrame(found[part]).drop(columns="map", errors="ignore")
        print(f"\n{part}\n{frame.to_string(index=False, float_format='{:.5g}'.format)}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found.get("hypervolume"), indent=1))


if __name__ == "__main__":
    main()
