"""What a backend is given, and what it gives: a way to run a plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from bitalloc.errors import BitallocError
from bitalloc.formats.bitalloc import Reader
from bitalloc.option import PASS_THROUGH, Option, from_row
from bitalloc.suites import Windows

for _noisy in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # they remark on themselves, whoever imports them
    getLogger(_noisy).setLevel("ERROR")

EXTRA = "pip install 'bitalloc[backends]'"


@dataclass(frozen=True)
class Subject:
    """A plan to run: its native checkpoint, the unquantised model behind it, and a folder to write to."""

    reader: Reader
    source: Path
    scratch: Path
    device: torch.device
    remote_code: bool = False


class Runnable(NamedTuple):
    """`load` gives the `transformers` model.

    `write` brings what it reads to disk before, and says how many bytes of weights that are; None for a backend that
    makes its weights in memory. `speed` gives tokens a second where the software of a format is not `transformers`.
    """

    load: Callable[[], Any]
    write: Callable[[], int] | None = None
    speed: Callable[[Windows], float | None] | None = None


def library(name: str, remedy: str) -> ModuleType:
    """The module of that name; raises `BitallocError` with the remedy when it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise BitallocError(f"not run: {name} cannot be imported here ({reason}); {remedy}") from None


def coded(reader: Reader) -> Iterator[tuple[str, Option, int]]:
    """(layer, option, inputs) of every matrix that the plan gives codes."""
    for layer, row in reader.plan.items():
        if row["quantizer"] != PASS_THROUGH:
            yield layer, from_row(row, reader.options), row["columns"]


def linear(reader: Reader, name: str) -> None:
    """Raise `BitallocError` for a family whose matrices are no `nn.Linear`."""
    if reader.family.transposed:
        raise BitallocError(f"{name} quantises nn.Linear, which {reader.family.name} has none of; native carries it")
