"""What a scheme quantises and what it leaves, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES, Family
from bitalloc.store import digest


@dataclass(frozen=True)
class Unit:
    """Rows of a matrix that have bits of their own."""

    name: str  # of the whole matrix: its layer; of in_proj of Mamba2: layer.z, .x, .B, .C, .dt
    rows: slice


@dataclass(frozen=True)
class Matrix:
    """A Linear in scope."""

    layer: str
    role: str
    block: int
    site: str
    rows: int
    columns: int
    units: tuple[Unit, ...]
    online: bool  # a scheme's `online` rotates its input


@dataclass(frozen=True)
class Scope:
    """What is quantised and what is not, and why: one row for each kind of tensor, blocks counted."""

    family: Family
    matrices: tuple[Matrix, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def json(self) -> str:
        return json.dumps([dict(row) for row in self.rows], sort_keys=True)

    @property
    def digest(self) -> str:
        return digest([dict(row) for row in self.rows])

    def __str__(self) -> str:
        shown = pd.DataFrame(self.rows).assign(scope=lambda frame: np.where(frame["quantised"], "in", "out"))
        return shown[["scope", "tensor", "count", "shape", "kind", "reason"]].to_string(index=False)


def scope(model: nn.Module) -> Scope:
    """Which tensors of the model are in and which are out; raises `BitallocError` for one that its family leaves open.

    Raises it too for a model of no known family and for matrices that are no `nn.Linear`.
    """
    name = type(model).__name__
    family = next((known for known in FAMILIES.values() if name in known.architectures), None)
    if family is None:
        raise BitallocError(f"no family is known for {name}; add it to bitalloc/families.py")
    matrices, rows = [], {}
    for tensor, parameter in model.named_parameters(remove_duplicate=False):
        role, block, kind, reason = family.claim(tensor)
        pattern = tensor
        if tensor.startswith(f"{family.blocks}."):
            pattern = f"{family.blocks}.*.{tensor.removeprefix(f'{family.blocks}.').partition('.')[2]}"
        facts = {"quantised": role is not None, "kind": kind, "reason": reason or "a Linear of every block"}
        row = rows.setdefault(pattern, {"tensor": pattern, "shape": list(parameter.shape), **facts, "count": 0})
        row["count"] += 1
        if role is None:
            continue
        layer = tensor.removesuffix(".weight")
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise BitallocError(f"{layer} is {type(model.get_submodule(layer)).__name__}, no nn.Linear as schemes need")
        parts = _parts(model.config, family, role.name)
        units = tuple(Unit(f"{layer}.{part}" if part else layer, at) for part, at in parts)
        online = role.site == family.roles[-1].site
        site = f"{block}.{role.site}"
        matrices.append(Matrix(layer, role.name, block, site, *parameter.shape, units=units, online=online))
    if not matrices:
        raise BitallocError(f"{name} has no Linear left to quantise: a scheme was applied to it; load it again")
    return Scope(family, tuple(matrices), tuple(rows.values()))


def _parts(config: Any, family: Family, role: str) -> list[tuple[str, slice]]:
    """Row blocks of a matrix; of in_proj of Mamba2 gate z, input x, B, C and step dt, in the order of its rows."""
    if family.name != "mamba2" or role != "in_proj":
        return [("", slice(None))]
    inner, state = int(config.expand * config.hidden_size), config.n_groups * config.state_size
    sizes = {"z": inner, "x": inner, "B": state, "C": state, "dt": config.num_heads}
    edges = np.cumsum([0, *sizes.values()]).tolist()
    return [(part, slice(a, b)) for part, a, b in zip(sizes, edges, edges[1:], strict=False)]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
