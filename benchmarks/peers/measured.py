"""What the workers on one matrix share: read a problem, quantise it once, print what that took as one line of JSON.

python matrix_TOOL.py PROBLEM.safetensors WHAT.safetensors SETTINGS   (SETTINGS as JSON)

Runs in the environment of each tool, so it imports nothing but torch and safetensors. CPU seconds are those of
all threads of the process and of the children it waited for; the imports and the preparation are not in them.
Memory is read from /proc (Linux): resident before the measured call, and its peak during it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SMALL = 256  # rows and columns of the warm-up


@dataclass(frozen=True)
class Tool:
    """One library: `quantise` is measured, the rest is not."""

    package: str
    reads: str  # the tensor beside W_OI that it works on: X_TI, H_II or none
    prepare: Callable[[Tensor, Tensor | None, dict[str, Any]], Any]  # W_OI, that tensor, settings
    quantise: Callable[[Any], Any]  # what `prepare` returned
    dequantise: Callable[[Any], Tensor]  # what `quantise` returned -> What_OI


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def memory_mb(field: str) -> int:
    """VmRSS or VmHWM of /proc/self/status; `ru_maxrss` would report the parent's peak where that is larger."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024


def work(tool: Tool) -> None:
    """Measure one quantisation of the problem named on the command line."""
    parser = argparse.ArgumentParser(description="Quantise one matrix in this environment, and say what it took.")
    parser.add_argument("problem", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    settings = arguments.settings
    torch.set_num_threads(settings["threads"])
    with safe_open(arguments.problem, "pt") as file:
        W_OI = file.get_tensor("W_OI")
        inputs = file.get_tensor(tool.reads) if tool.reads else None

    def once(W_OI: Tensor, inputs: Tensor | None) -> tuple[Any, dict[str, float]]:
        prepared = tool.prepare(W_OI, inputs, settings)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of what follows, not of what came before
        before_mb, wall, cpu = memory_mb("VmRSS"), time.perf_counter(), cpu_seconds()
        found = tool.quantise(prepared)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        return found, {"seconds": cpu, "wall_s": wall, "before_mem_mb": before_mb, "peak_mem_mb": memory_mb("VmHWM")}

    # a small call first: what compiles or sets itself up at the first call does so there
    rows = 0 if inputs is None else SMALL * len(inputs) // W_OI.shape[1]
    small = None if inputs is None else inputs[:rows, :SMALL].contiguous()
    first = once(W_OI[:SMALL, :SMALL].contiguous(), small)[1]
    found, row = once(W_OI, inputs)
    save_file({"What_OI": tool.dequantise(found).float().contiguous()}, arguments.result)
    row |= {"seconds_first": first["seconds"], "version": metadata.version(tool.package), "torch": torch.__version__}
    print("\n" + json.dumps(row), flush=True)  # on a line of its own: libraries print too
