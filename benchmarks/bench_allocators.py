"""Every strategy on seeded allocation problems of known structure: regret against the exact optimum, and time.

python benchmarks/bench_allocators.py [--quick]  ->  a table, and benchmarks/results/allocators.json

Instances are drawn in three sets. On `train` the settings of evolve are tried, on `valid` one of the best three is
chosen, `test` alone is reported. `uniform`, `manual`, `greedy` and `optimal` read the table of costs, N K entries;
random and evolve see nothing but the objective of whole plans, as many as the table has entries, `CAP` at most. The
optimum is that of `optimal`, whose certificate is printed: it and not the table is what "exact" rests on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from bitalloc.option import Option
from bitalloc.progress import Progress
from bitalloc.provenance import run_record
from bitalloc.strategies import STRATEGIES, Choice, Instance
from bitalloc.strategies.evolve import evolve
from bitalloc.strategies.optimal import gap, solve

SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
OPTIONS = tuple(Option("gptq", bits, 128, rank) for bits in (2, 3, 4) for rank in (0, 32, 64, 128))
BITS_PER_WEIGHT = (2.4, 3.0)
SIZES = {12: 3, 48: 3, 200: 3, 1000: 1}  # layers: instances of each structure
SETS = {"train": 0, "valid": 1_000, "test": 2_000}  # first seed
SETTINGS = [{"offspring": o, "switches": s} for o, s in product((4, 16, 64), (1, 3, 6))]
CAP = 1_000  # plans that a search may cost

Structure = Callable[[np.random.Generator, int], np.ndarray]  # (rng, N) -> factor_NK on the error of the law


def law(rng: np.random.Generator, N: int, spread: float = 1.5) -> np.ndarray:
    """cost = coefficient 2^(-2.2 bits) (1 + rank / 32)^-delta: what sweeps of real models look like."""
    bits_K, rank_K = (np.array([getattr(option, name) for option in OPTIONS]) for name in ("bits", "rank"))
    error_NK = 2.0 ** (-2.2 * bits_K) * (1 + rank_K / 32) ** -rng.uniform(0.1, 0.9, (N, 1))
    return rng.lognormal(0, spread, (N, 1)) * error_NK


def flat(rng: np.random.Generator, N: int) -> np.ndarray:
    """All layers nearly alike: little to allocate by."""
    return law(rng, N, spread=0.1)


def outliers(rng: np.random.Generator, N: int) -> np.ndarray:
    """One layer in sixteen costs a thousand times as much."""
    costs_NK = law(rng, N, spread=0.5)
    costs_NK[rng.permutation(N)[: max(1, N // 16)]] *= 1000
    return costs_NK


def noisy(rng: np.random.Generator, N: int) -> np.ndarray:
    """Errors half of which are noise: no table of a layer is convex in its bytes."""
    return law(rng, N) * rng.lognormal(0, 0.7, (N, len(OPTIONS)))


def proportional(rng: np.random.Generator, N: int) -> np.ndarray:
    """A byte is worth the same everywhere, to a thousandth: the knapsack that exact methods find hard."""
    nbytes_NK = sizes(N).astype(float)
    lost_NK = nbytes_NK.max(axis=1, keepdims=True) * 1.001 - nbytes_NK
    return lost_NK * rng.uniform(0.999, 1.001, nbytes_NK.shape) / nbytes_NK.max()


STRUCTURES: dict[str, Structure] = {f.__name__: f for f in (law, flat, outliers, noisy, proportional)}


def sizes(N: int) -> np.ndarray:
    shapes = (SHAPES * -(-N // len(SHAPES)))[:N]
    return np.array([[option.nbytes(*shape) for option in OPTIONS] for shape in shapes])


def instance(structure: str, N: int, seed: int) -> Instance:
    costs_NK = STRUCTURES[structure](np.random.default_rng([seed, N]), N)
    weights_N = np.prod((SHAPES * -(-N // len(SHAPES)))[:N], axis=1)
    return Instance(tuple(map(str, range(N))), OPTIONS, weights_N, sizes(N), costs_NK)


def problems(chosen: str, layers: dict[int, int]) -> Iterator[tuple[dict, Instance, int]]:
    """(what it is, the instance, its budget in bytes) of a set."""
    for N, repeats in layers.items():
        for structure, repeat, bits in product(STRUCTURES, range(repeats), BITS_PER_WEIGHT):
            found = instance(structure, N, SETS[chosen] + repeat)
            what = {"layers": N, "structure": structure, "seed": repeat, "bits_per_weight": bits}
            yield what, found, int(bits * int(found.weights_N.sum()) / 8)


def best_of_random(given: Instance, budget: int, *, seed: int, evaluations: int) -> Choice:
    draws = (STRATEGIES["random"](given, budget, seed=[seed, draw]) for draw in range(evaluations))
    return min(draws, key=given.objective)


def polished(given: Instance, budget: int, *, seed: int, evaluations: int, **how: int) -> Choice:
    start_N = STRATEGIES["greedy"](given, budget)
    return evolve(given, budget, seed=seed, evaluations=evaluations, start_N=start_N, **how)


def runs(how: dict[str, int], evaluations: int, seed: int) -> dict[str, tuple[int, Callable[..., Choice]]]:
    """Strategy -> (plans or entries of the table that it reads, how it is run)."""
    table = {name: (evaluations, STRATEGIES[name]) for name in ("uniform", "manual", "greedy", "optimal")}
    count = min(evaluations, CAP)
    return table | {
        "random": (count, partial(best_of_random, seed=seed, evaluations=count)),
        "evolve": (count, partial(evolve, seed=seed, evaluations=count, **how)),
        "evolve x10": (10 * count, partial(evolve, seed=seed, evaluations=10 * count, **how)),
        "greedy + evolve": (evaluations + count, partial(polished, seed=seed, evaluations=count, **how)),
    }


def tuned(layers: dict[int, int]) -> tuple[dict[str, int], list[dict]]:
    """The settings of evolve of least regret on `valid`, among the best three of `train`; and what all had."""
    told, left = [], SETTINGS
    for chosen, survivors in (("train", 3), ("valid", 1)):
        regret: list[list[float]] = [[] for _ in left]
        for what, given, budget in problems(chosen, layers):
            optimum = solve(given, budget).objective
            for place, how in enumerate(left):
                plan = evolve(given, budget, seed=what["seed"], evaluations=min(given.costs_NK.size, CAP), **how)
                regret[place].append(given.objective(plan) / optimum - 1)
        means = [float(np.mean(values)) for values in regret]
        told += [{"set": chosen, **how, "mean_regret": mean} for how, mean in zip(left, means, strict=True)]
        left = [left[place] for place in np.argsort(means, kind="stable")[:survivors]]
    return left[0], told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 layers, an instance of each structure; seconds")
    quick = parser.parse_args().quick
    layers = {12: 1} if quick else SIZES
    how, told = tuned({12: 1} if quick else {12: 2, 48: 2})
    print(f"evolve on valid: {how}")
    rows = []
    tested = list(problems("test", layers))
    progress = Progress("allocators", len(tested), unit="instances")
    for what, given, budget in tested:
        solution = solve(given, budget)
        for name, (evaluations, run) in runs(how, given.costs_NK.size, what["seed"]).items():
            start = time.process_time()
            plan = run(given, budget)
            cpu_s = time.process_time() - start
            assert given.size(plan) <= budget
            regret = gap(given.objective(plan), solution.objective)
            rows.append(what | {"strategy": name, "evaluations": evaluations, "regret": regret, "cpu_s": cpu_s})
        rows.append(what | {"strategy": "certificate", "evaluations": 0, "regret": solution.gap, "cpu_s": 0.0})
        progress.advance(note=f"{what['structure']}, {what['layers']} layers")
    summary = summarised(pd.DataFrame(rows))
    for N, part in summary.groupby("layers"):
        print(f"\n{N} layers x {len(OPTIONS)} options: regret, median and worst of {part['instances'].max()} instances")
        print(f"{'':16}{'reads':>8}" + "".join(f"{name:>20}" for name in STRUCTURES) + f"{'CPU s':>10}")
        for name, mine in part.groupby("strategy", sort=False):
            cells = "".join(f"{row.median_regret:>11.2%} {row.worst_regret:>8.1%}" for row in mine.itertuples())
            print(f"{name:16}{mine['evaluations'].max():>8,}{cells}{mine['cpu_s'].median():>10.4f}", flush=True)
    if not quick:
        found = {"record": run_record("numpy", "scipy"), "evolve": how, "tuning": told}
        found["rows"] = summary.to_dict("records")
        path = Path(__file__).parent / "results" / "allocators.json"
        path.write_text(json.dumps(found, indent=1) + "\n")


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """Over the instances and budgets of one structure and size."""
    groups = rows.groupby(["layers", "strategy", "structure"], sort=False)
    found = groups.agg(
        evaluations=("evaluations", "max"),
        instances=("regret", "size"),
        median_regret=("regret", "median"),
        worst_regret=("regret", "max"),
        cpu_s=("cpu_s", "median"),
    ).reset_index()
    place = {name: at for at, name in enumerate(STRUCTURES)}
    return found.sort_values("structure", key=lambda name: name.map(place), kind="stable")


if __name__ == "__main__":
    main()
