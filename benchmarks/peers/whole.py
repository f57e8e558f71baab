"""What the workers that quantise whole models share: python model_TOOL.py JOB.json

A worker runs in the environment of its tool, so this imports nothing but torch and safetensors. It leaves in the
folder of the job

    weights.safetensors   What of every linear layer, dequantised, as `module.weight` has it
    checkpoint/           what the tool itself stores, if it stores safetensors; else the worker says what it would
    said.json             the setting in words, the version, and what writing the first file took: it is not the tool's

Legend: W_OI a matrix of O outputs and I inputs, ids_NT token ids of N windows.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# beside the codes, scales, zeros and factors: sums that any tool leaves alone, an index that counts up, a shape
NOT_COUNTED = ("bias", "g_idx", "weight_shape")
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Stored = dict[str, dict[str, list[Any]]]  # layer -> tensor -> [dtype as safetensors writes it, shape]


@dataclass
class Job:
    """One model at one budget. `nbytes` is what the linear `layers` (name -> [O, I]) may take together."""

    model: str
    tokens: str
    out: Path
    layers: dict[str, list[int]]
    nbytes: int
    threads: int
    seed: int
    plan: dict[str, dict[str, int]] = field(default_factory=dict)  # layer -> bits, group_size: where it is given
    exchange: dict[str, float] = field(default_factory=lambda: {"cpu_s": 0.0, "wall_s": 0.0})

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.layers.values())

    @property
    def bpw(self) -> float:
        """Bits a weight that the budget allows."""
        return 8 * self.nbytes / self.weights

    def ids(self) -> Tensor:
        """ids_NT of the calibration windows."""
        return load_file(self.tokens)["ids_NT"].long()

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Write What of every layer for the evaluation."""
        missing = sorted(set(self.layers) - set(weights))
        if missing:
            raise SystemExit(f"the tool has no {missing[0]}; it renamed {len(missing)} of {len(self.layers)} layers")
        with self.aside():
            file = self.out / "weights.safetensors"
            save_file({name: weights[name].detach().float().cpu().contiguous() for name in self.layers}, file)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done for the comparison alone is not counted."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.exchange["cpu_s"] += time.process_time() - cpu
        self.exchange["wall_s"] += time.perf_counter() - wall


def work(package: str, quantise: Callable[[Job], tuple[str, Stored | None]]) -> None:
    """Do the job of the command line. `quantise` gives the setting in words and what is stored, if not a checkpoint."""
    given = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**{**given, "out": Path(given["out"])})
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    setting, kept = quantise(job)
    said = {
        "setting": setting,
        "version": metadata.version(package),
        "torch": torch.__version__,
        "stored": kept or stored(job.checkpoint, job.layers),
        "exchange": job.exchange,
    }
    (job.out / "said.json").write_text(json.dumps(said))


def linear(model: torch.nn.Module, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of those modules, by name."""
    return {name: model.get_submodule(name).weight for name in layers}


# ---- bytes -------------------------------------------------------------------------------------------
def stored(checkpoint: Path, layers: Mapping[str, Any]) -> Stored:
    """What a folder of safetensors holds for each layer."""
    found: Stored = {name: {} for name in layers}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - no mapping
                layer, _, part = name.rpartition(".")
                if layer in found:
                    tensor = handle.get_slice(name)
                    found[layer][part] = [tensor.get_dtype(), tensor.get_shape()]
    return found


def nbytes(kept: Stored) -> int:
    """Bytes of codes, scales, zeros and factors. A matrix that was left alone counts 16 bits, whatever its type.

    >>> nbytes({"q": {"qweight": ["I32", [8, 128]], "scales": ["F16", [4, 128]], "bias": ["F32", [128]]}})
    5120
    >>> nbytes({"q": {"weight": ["F32", [8, 4]]}})
    64
    """
    total = 0
    for layer, parts in kept.items():
        counted = {name: part for name, part in parts.items() if name not in NOT_COUNTED}
        if not counted:
            raise ValueError(f"nothing is stored of {layer}")
        for name, (dtype, shape) in counted.items():
            alone = name == "weight" and dtype in ("F64", "F32")
            total += (2 if alone else ITEMSIZE[dtype]) * math.prod(shape)
    return total


def uniform_nbytes(layers: Mapping[str, list[int]], bits: int, group_size: int, *, zeros: bool, least: int = 1) -> int:
    """Bytes of all layers at b bits in groups of g: O I b / 8 codes, O I / g scales of 16 bits, zeros of b bits.

    A matrix whose width is no multiple of g has one group a row, and one with a side that is no multiple of `least`
    keeps 16 bits.

    >>> uniform_nbytes({"q": [128, 128]}, 2, 64, zeros=True), uniform_nbytes({"q": [128, 96]}, 2, 64, zeros=False)
    (4672, 3328)
    """
    total = 0
    for rows, columns in layers.values():
        groups = columns // group_size if columns % group_size == 0 else 1
        quantised = rows * columns * bits // 8 + rows * groups * (16 + bits * zeros) // 8
        total += 2 * rows * columns if rows % least or columns % least else quantised
    return total


def largest(job: Job, *, zeros: bool, bits: tuple[int, ...] = (2, 3, 4, 8), least: int = 1) -> tuple[int, int]:
    """(bits, group size) of the uniform setting that fills the budget best; the smallest of all where none fits."""
    sizes = {(b, g): uniform_nbytes(job.layers, b, g, zeros=zeros, least=least) for b in bits for g in (128, 64, 32)}
    fits = {place: size for place, size in sizes.items() if size <= job.nbytes}
    return max(fits, key=lambda place: (fits[place], place)) if fits else min(sizes, key=sizes.__getitem__)
