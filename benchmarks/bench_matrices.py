"""One matrix quantised by GPTQModel, by hqq and by bitalloc, in turns on one machine: CPU seconds, ratio and error.

python benchmarks/bench_matrices.py [--shapes 1024x1024] [--threads 1]  ->  a table, benchmarks/results/matrices.json

4 bits, groups of 128, damping .1, the same weights and inputs for all. A worker process for every measurement
(benchmarks/peers/matrix_*.py say what is measured), in an environment for every peer (`--environments`, made by pip at
the first run: a network, a C compiler and some minutes). The error is computed here, by one formula.

    order       none: columns as they come. groups: groups by falling moment and columns within them likewise, which
                is ours and GPTQModel's default (ours sums a group's moments, GPTQModel takes the largest). columns:
                all columns by falling moment, which needs an index stored
    range       minmax, or searched: ours by 11 clipping ranges weighted by the moments, GPTQModel's by 80
                unweighted ones (its `mse=2`), hqq's by its optimiser, zeros then no longer being integers

Threads wait passively (OMP_WAIT_POLICY), and one thread is the default: spinning is no work, and counts as CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from problems import problem, relative_error
from running import HERE, FailedError, environment, threaded
from safetensors.torch import load_file, save_file

from bitalloc.provenance import run_record
from bitalloc.store import write_atomically

COLUMNS = "shape threads gain tool version zero order range CPU_s ratio rel_error first MB_rise MB"
WIDTHS = (11, 7, 4, 10, 7, 5, 8, 9, 8, 6, 9, 6, 7, 6)
SETTINGS = {"bits": 4, "group_size": 128, "damping": 0.1}


@dataclass(frozen=True)
class Run:
    tool: str
    order: str
    symmetric: bool = False
    mse: float = 0.0  # GPTQModel: exponent of its range search, 0 for none

    @property
    def range(self) -> str:
        return "minmax" if self.tool == "gptqmodel" and not self.mse else "searched"


RUNS = (
    Run("bitalloc", "groups"),
    Run("bitalloc", "groups", symmetric=True),
    Run("gptqmodel", "none"),
    Run("gptqmodel", "groups"),
    Run("gptqmodel", "columns"),
    Run("gptqmodel", "groups", mse=2.0),
    Run("gptqmodel", "none", symmetric=True),
    Run("gptqmodel", "groups", symmetric=True),
    Run("hqq", "none"),
)


def measure(run: Run, python: Path, problem_file: Path, threads: int) -> tuple[dict, torch.Tensor] | None:
    """What the worker printed, and What_OI; None, and a line that says why, where it fails."""
    settings = SETTINGS | asdict(run) | {"threads": threads}
    result = problem_file.with_name("what.safetensors")
    environ = threaded(threads, ours=run.tool == "bitalloc")
    file = HERE / f"peers/matrix_{run.tool}.py"
    worker = [str(python), str(file), str(problem_file), str(result), json.dumps(settings)]
    done = subprocess.run(worker, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        line = f"{run.tool}: a run failed ({(done.stderr.strip() or '?').splitlines()[-1]})"
        if run.tool == "bitalloc":
            raise SystemExit(line)  # nothing to compare with
        print(line, flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1]), load_file(result)["What_OI"]


def compare(shape: tuple[int, int], gain: float, pythons: dict[str, Path], threads: int, repeats: int) -> list[dict]:
    """A row for every run; the runs take turns, so that a ratio compares neighbours in time."""
    given = problem(*shape, gain=gain)
    rounds: dict[Run, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        problem_file = Path(folder) / "problem.safetensors"
        save_file(given._asdict(), problem_file)
        for _ in range(repeats):
            ours: dict[bool, float] = {}
            for run in RUNS:
                if run.tool not in pythons or not (measured := measure(run, pythons[run.tool], problem_file, threads)):
                    continue
                found, What_OI = measured
                if run.tool == "bitalloc":
                    ours[run.symmetric] = found["seconds"]
                found["ratio"] = found["seconds"] / ours[run.symmetric]
                found["rel_error"] = relative_error(given.W_OI, What_OI, given.H_II)
                rounds.setdefault(run, []).append(found)
    return [_row(shape, gain, run, found, threads) for run, found in rounds.items()]


def _row(shape: tuple[int, int], gain: float, run: Run, found: list[dict], threads: int) -> dict:
    each = {name: [one[name] for one in found] for name in found[0]}
    return {
        "shape": list(shape),
        "gain": gain,
        "tool": run.tool,
        "version": found[0]["version"],
        "bits": SETTINGS["bits"],
        "group_size": SETTINGS["group_size"],
        "damping": None if run.tool == "hqq" else SETTINGS["damping"],
        "symmetric": run.symmetric,
        "order": run.order,
        "range": run.range,
        "seconds": statistics.median(each["seconds"]),
        "seconds_each": each["seconds"],
        "seconds_first": statistics.median(each["seconds_first"]),
        "wall_s": statistics.median(each["wall_s"]),
        "ratio": statistics.median(each["ratio"]),
        "rel_error": found[0]["rel_error"],
        "before_mem_mb": max(each["before_mem_mb"]),
        "peak_mem_mb": max(each["peak_mem_mb"]),
        "threads": threads,
        "device": "cpu",
        "torch": found[0]["torch"],
    }


def show(rows: list[dict]) -> None:
    for row in rows:
        cells = (
            "x".join(map(str, row["shape"])),
            row["threads"],
            f"{row['gain']:g}",
            row["tool"],
            row["version"],
            "sym" if row["symmetric"] else "asym",
            row["order"],
            row["range"],
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['rel_error']:.2e}",
            f"{row['seconds_first']:.2f}",
            row["peak_mem_mb"] - row["before_mem_mb"],
            row["peak_mem_mb"],
        )
        _line(cells)


def _line(cells: Sequence[object]) -> None:
    print(" ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


def _shape(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="+", help="O x I of the matrices",
                        default=[(1024, 1024), (4096, 4096), (14336, 4096)])  # fmt: skip
    parser.add_argument("--gain", type=float, nargs="+", default=[30], help="of the outlier channels; 1 for none")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, help="default: 5 up to 1024 x 1024, 2 above")
    parser.add_argument("--environments", type=Path, default=HERE.parent / ".peers", help="where the peers live")
    arguments = parser.parse_args()
    pythons = {"bitalloc": Path(sys.executable)}
    for peer in ("gptqmodel", "hqq"):
        try:
            pythons[peer] = environment(arguments.environments, peer)
        except FailedError as failed:
            print(f"{peer}: left out, {failed}", flush=True)
    _line(COLUMNS.split())
    rows: list[dict] = []
    for shape, gain, threads in product(arguments.shapes, arguments.gain, arguments.threads):
        torch.set_num_threads(threads)
        repeats = arguments.repeats or (5 if shape[0] * shape[1] <= 2**20 else 2)
        new = compare(shape, gain, pythons, threads, repeats)
        show(new)
        rows += new
        results = {"record": run_record("torch", "numpy"), "rows": rows}
        write_atomically(HERE / "results/matrices.json", (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
