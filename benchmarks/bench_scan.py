"""Mamba2's scan by matrix products against the reference of transformers, in turns, on one machine and one thread.

python benchmarks/bench_scan.py [--rounds 5]  ->  a table, benchmarks/results/scan.json

Heads, channels and state of `tiny_mamba2` and of Mamba2-130m; one sequence. Both get the same tensors; `apart` is the
norm of the difference over that of the reference's. `backward`: with gradients. Seconds are medians of CPU time, warmed
up; the ratio is of medians, its range that of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bitalloc import scan
from bitalloc.provenance import run_record
from bitalloc.store import write_atomically

SHAPES = {"tiny_mamba2": (8, 32, 64), "mamba2_130m": (24, 64, 128)}  # heads, channels of a head, entries of state
CASES = [
    *product(["tiny_mamba2"], (128, 1024), (32, 64, 128), (False, True)),
    ("mamba2_130m", 512, 64, False),
    ("mamba2_130m", 512, 256, False),
]


def tensors(shape: str, length: int, *, grad: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    heads, channels, state = SHAPES[shape]
    sizes = {"x": (heads, channels), "dt": (heads,), "B": (1, state), "C": (1, state)}
    made = {name: torch.randn(1, length, *size, generator=draw) for name, size in sizes.items()}
    made["A"] = -torch.arange(1.0, heads + 1)
    return {name: tensor.requires_grad_(grad) for name, tensor in made.items()}


def run(function: Any, given: dict[str, torch.Tensor], chunk: int, *, grad: bool) -> tuple[float, torch.Tensor]:
    """CPU seconds, and y."""
    start = time.process_time()
    with torch.set_grad_enabled(grad):
        y, _ = function(
            *(given[name] for name in ("x", "dt", "A", "B", "C")), chunk, dt_softplus=True, return_final_states=True
        )
        if grad:
            torch.autograd.grad(y.square().sum(), list(given.values()))
    return time.process_time() - start, y.detach()


def measure(shape: str, length: int, chunk: int, grad: bool, rounds: int) -> dict[str, Any]:
    given = tensors(shape, length, grad=grad)
    seconds: dict[str, list[float]] = {"transformers": [], "matrix": []}
    for turn in range(rounds + 1):  # the first warms up
        found = {}
        for name, function in (("transformers", scan.shipped()), ("matrix", scan.scan)):
            took, found[name] = run(function, given, chunk, grad=grad)
            seconds[name] += [took] if turn else []
    apart = (found["matrix"] - found["transformers"]).norm() / found["transformers"].norm()
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["matrix"], strict=True)]
    medians = {f"{name}_cpu_s": statistics.median(taken) for name, taken in seconds.items()}
    ratio = medians["transformers_cpu_s"] / medians["matrix_cpu_s"]
    case = {"shape": shape, "length": length, "chunk": chunk, "backward": grad}
    return {**case, **medians, "ratio": ratio, "ratio_range": [min(ratios), max(ratios)], "apart": apart.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("shape        length chunk backward  transformers    matrix  ratio [range]        apart")
    rows = []
    for case in CASES:
        row = measure(*case, rounds)
        rows.append(row)
        low, high = row["ratio_range"]
        print(
            f"{row['shape']:12} {row['length']:6} {row['chunk']:5} {row['backward']!s:8} "
            f"{row['transformers_cpu_s']:11.4f} s {row['matrix_cpu_s']:7.4f} s {row['ratio']:6.1f} "
            f"[{low:.1f}, {high:.1f}] {row['apart']:12.1e}",
            flush=True,
        )
    result = {"record": run_record("torch", "transformers"), "rounds": rounds, "threads": 1, "rows": rows}
    write_atomically(Path(__file__).parent / "results" / "scan.json", (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
