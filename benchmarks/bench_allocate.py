"""The exact allocation against HiGHS, alternately in one process: seconds, ratio and objective at several budgets.

python benchmarks/bench_allocate.py [--blocks 80]  ->  a table, and benchmarks/results/allocate.json

A 72B model: 7 matrices a block, 15 options each (2, 3, 4 bits x rank 0, 32, 64, 128, 256), seeded costs over
several orders of magnitude. HiGHS is scipy.optimize.milp with mip_rel_gap 1e-4 and 60 s at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from bitalloc.option import Option
from bitalloc.provenance import run_record
from bitalloc.strategies import STRATEGIES, Instance
from bitalloc.strategies.optimal import solve

SHAPES = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (29568, 8192), (29568, 8192), (8192, 29568)]
OPTIONS = tuple(Option("gptq", bits, 128, rank) for bits in (2, 3, 4) for rank in (0, 32, 64, 128, 256))
BITS_PER_WEIGHT = (2.2, 2.4, 2.6, 2.8, 3.3, 4.1)
REPEATS = 5


def model(blocks: int, seed: int = 0) -> Instance:
    """cost = coefficient x 2^(-2.2 bits) x (1 + rank / 32)^-delta, with 5 % noise."""
    rng = np.random.default_rng(seed)
    shapes = np.array(SHAPES * blocks)
    bits_K, rank_K = (np.array([getattr(option, name) for option in OPTIONS]) for name in ("bits", "rank"))
    delta_N = rng.uniform(0.1, 0.9, len(shapes))
    error_NK = 2.0 ** (-2.2 * bits_K) * (1 + rank_K / 32) ** -delta_N[:, None]
    costs_NK = rng.lognormal(0, 1.5, (len(shapes), 1)) * error_NK * rng.lognormal(0, 0.05, error_NK.shape)
    nbytes_NK = np.array([[option.nbytes(*map(int, shape)) for option in OPTIONS] for shape in shapes])
    return Instance(tuple(map(str, range(len(shapes)))), OPTIONS, shapes.prod(axis=1), nbytes_NK, costs_NK)


def highs(instance: Instance, budget: int) -> float:
    """Objective of the mixed integer programme."""
    n, k = instance.costs_NK.shape
    unit, scale = instance.nbytes_NK.max(), instance.costs_NK.mean()
    found = milp(
        instance.costs_NK.ravel() / scale,
        constraints=[
            LinearConstraint(kron(eye_array(n), np.ones((1, k))), 1, 1),
            LinearConstraint(csr_array(instance.nbytes_NK.reshape(1, -1) / unit), -np.inf, budget / unit),
        ],
        integrality=np.ones(n * k),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    return found.fun * scale


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(instance: Instance, bits_per_weight: float) -> dict[str, float]:
    budget = int(bits_per_weight * int(instance.weights_N.sum()) / 8)
    seconds: dict[str, list[float]] = {"ours": [], "highs": []}
    for repeat in range(REPEATS):
        ours_s, solution = timed(lambda: solve(instance, budget))
        seconds["ours"].append(ours_s)
        if repeat < 2:
            highs_s, objective = timed(lambda: highs(instance, budget))
            seconds["highs"].append(highs_s)
    ours_s, highs_s = statistics.median(seconds["ours"]), min(seconds["highs"])
    above = {
        name: instance.objective(STRATEGIES[name](instance, budget, seed=0)) / solution.objective - 1
        for name in ("greedy", "bits_only", "manual", "uniform")
    }
    return {
        "bits_per_weight": bits_per_weight,
        "ours_s": ours_s,
        "highs_s": highs_s,
        "ratio": highs_s / ours_s,
        "certified_gap": solution.gap,
        "over_highs": solution.objective / objective - 1,
        "unused_bytes": budget - instance.size(solution.choice_N),
        **{f"{name}_above": share for name, share in above.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=80)
    instance = model(parser.parse_args().blocks)
    print(f"{len(instance.layers)} matrices x {len(OPTIONS)} options; shares are above the optimum")
    print("bits/w   ours s  HiGHS s  ratio  cert. gap  over HiGHS   greedy  bits_only  manual  uniform")
    rows = []
    for bits_per_weight in BITS_PER_WEIGHT:
        row = measure(instance, bits_per_weight)
        rows.append(row)
        print(
            f"{row['bits_per_weight']:6.2f} {row['ours_s']:8.4f} {row['highs_s']:8.2f} {row['ratio']:6.0f} "
            f"{row['certified_gap']:10.1e} {row['over_highs']:11.1e} {row['greedy_above']:8.2%} "
            f"{row['bits_only_above']:10.1%} {row['manual_above']:7.0%} {row['uniform_above']:8.0%}",
            flush=True,
        )
    path = Path(__file__).parent / "results" / "allocate.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"record": run_record("numpy", "scipy"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
