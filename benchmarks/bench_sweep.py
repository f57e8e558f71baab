"""The sweep of one matrix against the same work without sharing, in one run: CPU seconds and ratios.

python benchmarks/bench_sweep.py [--shapes 1024x1024 4096x4096]  ->  a table, and benchmarks/results/sweep.json

15 options (2, 3, 4 bits x 5 ranks, group 128), one round, seeded weights and correlated inputs with outliers:

    shared      bitalloc: all options stacked in one column loop, one factorisation of the moments, one basis
    loop        factorisations, the basis and the codes of W shared, then GPTQ, refit and error of one option at a time
                (baseline.py)
    separate    everything from scratch for every option, with the whole SVD (baseline.py)
    floor       what the column loop cannot do without: O I^2 FLOP an option at the rate of a large float32 product,
                and reading and writing every weight of every option once, both measured in the same run

The cost of an option does not depend on its bits, and from scratch hardly on its rank: above 1024 x 1024, loop is
measured at 3 bits and separate at 3 bits, ranks 0 and the middle one, and multiplied by the options they stand for
(`measured` in the JSON; at 1024 x 1024 all 15 are run). `off_rank_0` and `off_rank_top` are the largest
differences of rel_error from the baseline, as a share. Every figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import baseline
import torch
from problems import problem
from torch import Tensor

from bitalloc.lowrank import Factor, Target, compress, decompose, leading
from bitalloc.option import Option
from bitalloc.provenance import run_record

SETTINGS = {"act_order": True, "iterations": 1}
BITS = (2, 3, 4)
Errors = dict[tuple[int, int], float]


def ranks(I: int) -> tuple[int, ...]:  # noqa: E741
    return (0, *(I // 128 * k for k in (1, 2, 4, 8)))


def shared(W_OI: Tensor, H_II: Tensor) -> Errors:
    factor = Factor(H_II, baseline.DAMPING)
    target = Target(W_OI, factor, act_order=True)
    stack = [(target, Option("gptq", b, baseline.GROUP, r, 16)) for b in BITS for r in ranks(len(H_II))]
    results = compress(stack, iterations=1, matrices=False)
    return {(o.bits, o.rank): r.error / target.output(o) for (_, o), r in zip(stack, results, strict=True)}


def loop(W_OI: Tensor, H_II: Tensor, bits: tuple[int, ...] = BITS) -> Errors:
    common = baseline.Shared.of(W_OI, H_II)
    A, B = leading(common.W_OI @ common.M_II, max(ranks(len(H_II))))
    B = torch.linalg.solve_triangular(common.M_II, B, upper=False, left=False)
    codes = {b: baseline.gptq(common.W_OI, common, b) for b in bits}
    return {
        (b, r): baseline.option(common, b, r, start=A[:, :r] @ B[:r], codes=codes[b])
        for b in bits
        for r in ranks(len(H_II))
    }


def separate(W_OI: Tensor, H_II: Tensor, wanted: list[tuple[int, int]]) -> Errors:
    return {(b, r): baseline.option(baseline.Shared.of(W_OI, H_II), b, r) for b, r in wanted}


def product(O: int, I: int) -> Callable[[], object]:  # noqa: E741
    A, B = torch.randn(O, I), torch.randn(I, I)
    return lambda: A @ B  # 2 O I^2 FLOP


def copy(O: int, I: int) -> Callable[[], object]:  # noqa: E741
    A, B = torch.randn(O, I), torch.empty(O, I)
    return lambda: B.copy_(A)


def measure(what: str, shape: tuple[int, int], threads: int, *arguments: object) -> dict:
    """Seconds, peak memory and errors of one piece of work, in this process."""
    torch.set_num_threads(threads)
    if what in ("product", "copy"):
        work = {"product": product, "copy": copy}[what](*shape)
        work()
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return {"seconds": min(times)}
    W_OI, _, H_II = problem(*shape)
    small = Option("gptq", 3, 128, 2)
    decompose(W_OI[:128, :128].contiguous(), Factor(H_II[:128, :128].contiguous(), 0.1), [small], **SETTINGS)
    base, start, wall = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    errors = {"shared": shared, "loop": loop, "separate": separate}[what](W_OI, H_II, *arguments)
    return {
        "seconds": time.process_time() - start,
        "wall_s": time.perf_counter() - wall,
        "mem_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "mem_before_mb": base // 1024,
        "errors": errors,
    }


def row(O: int, I: int, threads: int) -> dict:  # noqa: E741
    def apart(what: str, *arguments: object) -> dict:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, what, (O, I), threads, *arguments).result()

    options = [(b, r) for b in BITS for r in ranks(I)]
    everything = O * I <= 1024 * 1024
    ours = apart("shared")
    looped = apart("loop", BITS if everything else (3,))
    loop_s = looped["seconds"] * (1 if everything else len(BITS))
    if everything:
        alone = apart("separate", options)
        separate_s, errors = alone["seconds"], alone["errors"]
    else:
        none, some = apart("separate", [(3, 0)]), apart("separate", [(3, ranks(I)[3])])
        ranked = sum(r > 0 for _, r in options)
        separate_s = none["seconds"] * (len(options) - ranked) + some["seconds"] * ranked
        errors = looped["errors"] | none["errors"] | some["errors"]
    flop_s, copy_s = apart("product")["seconds"] / 2, apart("copy")["seconds"]
    floor = len(options) * (flop_s + copy_s)
    off = {key: abs(ours["errors"][key] / error - 1) for key, error in errors.items()}
    return {
        "shape": [O, I],
        "options": len(options),
        "seconds_shared": ours["seconds"],
        "seconds_loop": loop_s,
        "seconds_separate": separate_s,
        "ratio": separate_s / ours["seconds"],
        "ratio_loop": loop_s / ours["seconds"],
        "floor_seconds": floor,
        "over_floor": ours["seconds"] / floor,
        "peak_mem_mb": ours["mem_mb"],
        "problem_mem_mb": ours["mem_before_mb"],
        "wall_s": ours["wall_s"],
        "off_rank_0": max(value for (_, r), value in off.items() if r == 0),
        "off_rank_top": max(value for (_, r), value in off.items() if r == max(r for _, r in off)),
        "measured": "all options" if everything else "loop: 3 bits; separate: 3 bits, two ranks",
        "device": "cpu",
        "threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x4096", "14336x4096"], help="O x I")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    columns = ("seconds_shared", "seconds_loop", "seconds_separate", "ratio_loop", "ratio", "floor_seconds",
               "over_floor", "peak_mem_mb", "off_rank_0", "off_rank_top")  # fmt: skip
    print(f"{'shape':>12}" + "".join(f"{name:>17}" for name in columns) + "   (CPU seconds)", flush=True)
    path, rows = Path(__file__).parent / "results/sweep.json", []
    for shape in arguments.shapes:
        rows.append(row(*map(int, shape.split("x")), arguments.threads))
        print(f"{shape:>12}" + "".join(f"{rows[-1][name]:17.4g}" for name in columns), flush=True)
        path.write_text(json.dumps({"record": run_record("torch", "numpy", "numba"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
