"""The stacked sweep of one matrix against the same work without sharing, in one process: CPU seconds and ratios.

python benchmarks/bench_sweep.py [--size 1024]  ->  a table, and benchmarks/results/sweep.json

15 options (2, 3, 4 bits x 5 ranks, group 128), seeded weights with a decaying spectrum and correlated inputs:

    shared      all options stacked as rows in one column loop, one factorisation of the moments, one SVD of W
    loop        one factorisation of the moments, then one option at a time
    separate    everything from scratch for every option
    floor       the trailing updates of the column loop alone, 2 O I^2 / 2 FLOP an option and a round, at the rate
                that a float32 product of this size reaches here
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bitalloc.lowrank import Factor, decompose
from bitalloc.option import Option
from bitalloc.provenance import run_record

ITERATIONS = 1


def problem(size: int) -> tuple[torch.Tensor, torch.Tensor, list[Option]]:
    """W_OI, H_II and the options of a square matrix."""
    draw = torch.Generator().manual_seed(0)
    W_OI = torch.randn(size, size, generator=draw) * torch.linspace(1.5, 0.5, size)
    X_TI = torch.randn(2 * size, size, generator=draw) @ torch.randn(size, size, generator=draw) / size**0.5
    X_TI += torch.randn(2 * size, size, generator=draw)
    ranks = (0, *(size // 128 * k for k in (1, 2, 4, 8)))
    return W_OI, X_TI.T @ X_TI / len(X_TI), [Option("gptq", b, 128, r) for b in (2, 3, 4) for r in ranks]


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def run(size: int) -> dict:
    W_OI, H_II, options = problem(size)
    settings = {"act_order": True, "iterations": ITERATIONS}

    def separate() -> None:
        for option in options:
            decompose(W_OI, Factor(H_II, 0.1), [option], **settings)

    def loop() -> None:
        factor = Factor(H_II, 0.1)
        for option in options:
            decompose(W_OI, factor, [option], **settings)

    def shared() -> None:
        decompose(W_OI, Factor(H_II, 0.1), options, **settings)

    decompose(W_OI[:128, :128].contiguous(), Factor(H_II[:128, :128].contiguous(), 0.1), options[:1], **settings)
    seconds = {work.__name__: cpu_seconds(work) for work in (shared, loop, separate)}
    product = cpu_seconds(lambda: [W_OI @ H_II for _ in range(4)]) / 4  # 2 O I^2 FLOP
    floor = product / 2 * sum(1 + ITERATIONS * (option.rank > 0) for option in options)
    return {
        "shape": [size, size],
        "options": len(options),
        "seconds_shared": seconds["shared"],
        "seconds_loop": seconds["loop"],
        "seconds_separate": seconds["separate"],
        "ratio": seconds["separate"] / seconds["shared"],
        "ratio_loop": seconds["loop"] / seconds["shared"],
        "floor_seconds": floor,
        "over_floor": seconds["shared"] / floor,
        "peak_mem_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="O = I of the matrices")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [run(size) for size in arguments.size]
    columns = ("seconds_shared", "seconds_loop", "seconds_separate", "ratio_loop", "ratio", "over_floor")
    print(f"{'shape':>12}" + "".join(f"{name:>18}" for name in columns) + "   (CPU seconds)")
    for row in rows:
        print(f"{'x'.join(map(str, row['shape'])):>12}" + "".join(f"{row[name]:18.2f}" for name in columns))
    path = Path(__file__).parent / "results/sweep.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"record": run_record("torch", "numpy"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
