"""Rank versus bits by width, spectrum and inputs: how much error does offering rank save at equal bytes?

python benchmarks/bench_phase.py [--widths 64 256 1024] [--gpt2 FOLDER]  ->  a table, benchmarks/results/phase.json

The models of the sheet that run on a laptop are narrow. Here are wider matrices: random ones, whose singular values
fall as k^-a (a = 0: Gaussian, where rank has nothing to find), and attention weights of GPT-2. Inputs are correlated
(`problems.py`), without outliers or with one channel in 512 thirty times as large; for GPT-2 they are made up too.
Options: 2, 3, 4 bits x groups of 64 and 128 x ranks 0 and 1/64, 1/32, 1/16, 1/8 of the width, 8-bit factors.

`saved` as in `bitalloc.phase`: 1 - error of all options / error of those of rank 0, each the lower convex hull at so
many bits a weight. `most` is the largest over 2.2 to 4.4 bits, `at` where, `ratio` there the error if every matrix had
rank. Mean over matrices, smallest and largest beside it. `fall` is a of the weights themselves, fitted to their
singular values 1 to a quarter of the width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from problems import problem
from safetensors.torch import load_file
from torch import Tensor

from bitalloc.lowrank import Factor, Target, compress, stacks
from bitalloc.option import Option
from bitalloc.phase import LEVELS, compare
from bitalloc.provenance import run_record

SHOWN = (2.5, 3.0, 3.5)
WITHIN = (LEVELS >= 2.2) & (LEVELS <= 4.4)
GAINS = {"plain": 1.0, "outliers": 30.0}  # of the outlier channels
Case = tuple[str, str, Tensor, Tensor]  # weights, inputs, W_OI, H_II


def spectral(rows: int, columns: int, exponent: float, seed: int) -> Tensor:
    """W_OI of random singular vectors, singular values k^-exponent; Gaussian at 0."""
    draw = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(rows, columns, generator=draw)
    if not exponent:
        return W_OI
    U, _, V = torch.linalg.svd(W_OI, full_matrices=False)
    return (U * torch.arange(1, U.shape[1] + 1) ** -exponent) @ V


def random_cases(widths: list[int], seeds: int) -> Iterator[Case]:
    for width in widths:
        for rows, columns in ((width, width), (4 * width, width), (width, 4 * width)):
            if 4 * width > 2048 and rows != columns:
                continue
            for inputs, gain in GAINS.items():
                for exponent in (0.0, 0.5, 1.0):
                    for seed in range(seeds):
                        H_II = problem(1, columns, seed, gain).H_II
                        yield f"k^-{exponent:g}", inputs, spectral(rows, columns, exponent, seed), H_II


def gpt2_cases(folder: Path) -> Iterator[Case]:
    moments = {inputs: problem(1, 768, 0, gain).H_II for inputs, gain in GAINS.items()}
    for name, tensor in sorted(load_file(folder / "attention_5layers_fp16.safetensors").items()):
        if tensor.ndim == 2 and tensor.shape[0] == 768:
            for inputs, H_II in moments.items():
                yield f"GPT-2 {name.rsplit('.', 2)[-2]}", inputs, tensor.float().T.contiguous(), H_II


def errors(W_OI: Tensor, H_II: Tensor) -> pd.DataFrame:
    """bytes and relative error of every option of a matrix."""
    target = Target(W_OI, Factor(H_II, 0.1), act_order=True)
    ranks = sorted({0, *(max(1, min(W_OI.shape) // share) for share in (64, 32, 16, 8))})
    every = [(target, Option("gptq", b, g, r)) for g in (64, 128) if g <= len(H_II) for b in (2, 3, 4) for r in ranks]
    rows = []
    for stack in stacks(every):
        for (_, option), result in zip(stack, compress(stack, iterations=1, matrices=False), strict=True):
            place = {name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
            cost = result.error / target.output(option)
            rows.append(place | {"nbytes": option.nbytes(*W_OI.shape), "cost": cost})
    return pd.DataFrame(rows)


def fall(W_OI: Tensor) -> float:
    """a of singular values ~ k^-a, least squares over the logarithms of the first quarter."""
    top = torch.linalg.svdvals(W_OI)[: min(W_OI.shape) // 4].numpy()
    return -float(np.polyfit(np.log(np.arange(1, len(top) + 1)), np.log(top), 1)[0])


def study(cases: Iterator[Case]) -> list[dict]:
    found: dict[tuple, list[pd.DataFrame]] = {}
    falls: dict[tuple, list[float]] = {}
    for weights, inputs, W_OI, H_II in cases:
        rows, columns = W_OI.shape
        at = compare(errors(W_OI, H_II), np.floor(LEVELS * rows * columns / 8))
        key = (weights, inputs, rows, columns)
        found.setdefault(key, []).append(at)
        falls.setdefault(key, []).append(fall(W_OI))
    told = []
    for key, parts in found.items():
        weights, inputs, rows, columns = key
        saved_ML = 100 * np.stack([part["saved"].to_numpy(float) for part in parts])
        ratio_L = np.stack([part["ratio"].to_numpy(float) for part in parts]).mean(axis=0)
        best = int(np.nanargmax(np.where(WITHIN, saved_ML.mean(axis=0), np.nan)))
        row = {"weights": weights, "inputs": inputs, "rows": rows, "columns": columns, "width": min(rows, columns)}
        row |= {f"saved_{level}": float(saved_ML[:, level == LEVELS].mean()) for level in SHOWN}
        row |= {"most": float(saved_ML[:, best].mean()), "at": float(LEVELS[best]), "matrices": len(parts)}
        ends = [float(end(saved_ML[:, best])) for end in (np.min, np.max)]
        told.append(row | {"least_most": ends, "ratio": float(ratio_L[best]), "fall": float(np.mean(falls[key]))})
        print(
            f"{weights:14}{inputs:10}{rows:5} x {columns:<5}"
            + "".join(f"{row[f'saved_{level}']:8.1f}" for level in SHOWN)
            + f"{row['most']:8.1f} [{ends[0]:.1f}, {ends[1]:.1f}] at {row['at']:.2f}   ratio {ratio_L[best]:.2f}"
            f"   fall {told[-1]['fall']:.2f}",
            flush=True,
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 256, 1024])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpt2", type=Path, help="folder with attention_5layers_fp16.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("error saved by offering rank, %, at" + "".join(f" {level} bits" for level in SHOWN) + ", and at most")
    rows = study(random_cases(arguments.widths, arguments.seeds))
    if arguments.gpt2:
        rows += study(gpt2_cases(arguments.gpt2))
    path = Path(__file__).parent / "results/phase.json"
    path.write_text(json.dumps({"record": run_record("torch", "numba"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
