"""In which order to fit codes and low-rank part: rel_error by start and step, on trained matrices.

python benchmarks/bench_rounds.py [--models tiny stories260k] [--gpt2 FOLDER]  ->  a table a source, and
benchmarks/results/rounds.json

    LF0         the low-rank part of W first, then the codes of the rest (what `iterations: 0` gives)
    QF0'        the codes of W first, then the low-rank part of the rest
    LF0', LF1, LF1' ..    the low-rank part refitted ('), quantised again, refitted ..; likewise QF1, QF1' ..
    best0', best1'        the better of the two starts for every matrix (what `iterations: 1` and 2 come near)

Every figure is the geometric mean over matrices of the best error so far, as a share of that of LF0. Models need
their moments (`snakemake --cores 2 results/tiny/moments.parquet`); of GPT-2 only attention weights are at hand, so
its moments are made up: correlated inputs, 4 of 768 of them outliers at 30 times the size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from bitalloc import config
from bitalloc.experiments import open_experiments
from bitalloc.lowrank import Factor, _factors, leading
from bitalloc.option import Option
from bitalloc.provenance import run_record
from bitalloc.quant import Order, Stack, quantizer

ROUNDS = 3
Matrix = tuple[Tensor, Factor, list[Option]]


def codes(X_IO: Tensor, option: Option, order: Order) -> Tensor:
    """The nearest grid points of X, with error feedback."""
    stack = Stack.of([X_IO.shape[1]], [option.bits], symmetric=False, device=X_IO.device)
    return X_IO - quantizer("gptq")(X_IO.clone(memory_format=torch.contiguous_format), stack, order).D_IR


def lowrank(T_IO: Tensor, option: Option, order: Order) -> Tensor:
    """The best low-rank part of T in the norm of the moments, rounded as it is stored."""
    R_IR, L_RO = _factors(*leading(order.whiten(T_IO), option.rank), order, option).transposed(order)
    return R_IR @ L_RO


def trace(W_OI: Tensor, factor: Factor, option: Option) -> dict[str, float]:
    """Error after each step of both starts, the best so far."""
    order = factor.order(option.group_size, True)
    W_IO = W_OI.T[order.permutation_I]
    found: dict[str, float] = {}
    for start in ("LF", "QF"):
        best = (math.inf, math.inf)

        def note(step: str, D_IO: Tensor) -> None:
            nonlocal best
            damped = float(order.whiten(D_IO).double().square().sum())
            best = min(best, (damped, damped - factor.lam * float(D_IO.double().square().sum())))
            found[step] = best[1]

        LR_IO = lowrank(W_IO, option, order) if start == "LF" else torch.zeros_like(W_IO)
        for k in range(ROUNDS):
            Q_IO = codes(W_IO - LR_IO, option, order)
            if start == "LF" or k:
                note(f"{start}{k}", W_IO - Q_IO - LR_IO)
            LR_IO = lowrank(W_IO - Q_IO, option, order)
            note(f"{start}{k}'", W_IO - Q_IO - LR_IO)
    return found | {f"best{k}'": min(found[f"LF{k}'"], found[f"QF{k}'"]) for k in range(ROUNDS)}


def of_model(name: str) -> Iterator[Matrix]:
    """All matrices of a model under its own moments."""
    settings = config.parse(
        yaml.safe_load(Path("config/config.yaml").read_text()) | yaml.safe_load(Path("config/models.yaml").read_text())
    ).for_model(name)
    files = {"checkpoint": "checkpoint.json", "inventory": "inventory.parquet", "moments": "moments.parquet"}
    ours = open_experiments({part: Path("results") / name / file for part, file in files.items()}, settings)
    group_size = max(settings.sweep.group_sizes)
    for layer in ours.layers:
        target = ours._target(layer)
        yield target.W_OI, target.factor, [Option("gptq", b, group_size, r) for b in (2, 3, 4) for r in (4, 16)]


def of_gpt2(folder: Path) -> Iterator[Matrix]:
    n, draw = 768, torch.Generator().manual_seed(0)
    mix = torch.randn(n // 8, n, generator=draw) * torch.logspace(0, -1, n // 8)[:, None]
    X_TI = torch.randn(2 * n, n // 8, generator=draw) @ mix / (n // 8) ** 0.5 * 2
    X_TI += torch.randn(2 * n, n, generator=draw) * 0.5 * (torch.rand(n, generator=draw) + 0.3)
    X_TI[:, torch.randperm(n, generator=draw)[:4]] *= 30
    factor = Factor(X_TI.T @ X_TI / len(X_TI), 0.1)
    for _, tensor in sorted(load_file(folder / "attention_5layers_fp16.safetensors").items()):
        if tensor.shape == (n, n):
            yield (
                tensor.float().T.contiguous(),
                factor,
                [Option("gptq", b, 128, r) for b in (2, 3, 4) for r in (16, 64)],
            )


def table(source: str, matrices: Iterator[Matrix]) -> list[dict]:
    shares: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for W_OI, factor, options in matrices:
        for option in options:
            found = trace(W_OI, factor, option)
            for step, error in found.items():
                shares[option.bits, option.rank][step].append(math.log(error / found["LF0"]))
    rows = []
    for (bits, rank), steps in shares.items():
        means = {step: math.exp(sum(values) / len(values)) for step, values in steps.items()}
        rows.append({"source": source, "bits": bits, "rank": rank, "matrices": len(steps["LF0"]), **means})
    print(
        f"\n{source}, {rows[0]['matrices']} matrices\nbits rank" + "".join(f"{step:>8}" for step in list(rows[0])[4:])
    )
    for row in rows:
        print(
            f"{row['bits']:4} {row['rank']:4}" + "".join(f"{value:8.3f}" for value in list(row.values())[4:]),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["tiny"])
    parser.add_argument("--gpt2", type=Path, help="folder with attention_5layers_fp16.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = [row for name in arguments.models for row in table(name, of_model(name))]
    if arguments.gpt2:
        rows += table("gpt2 attention", of_gpt2(arguments.gpt2))
    path = Path(__file__).parent / "results/rounds.json"
    path.write_text(json.dumps({"record": run_record("torch", "numba"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
