"""Where a scheme hurts: each module quantised alone, and each one spared while all others are -> LAYERWISE.

A module is a matrix, and in Mamba2 each row block of in_proj beside: gate z, input x, B, C and step dt. Quantised or
spared are its weights and the input that it reads. KL to the unquantised model on the windows of the select split.

Legend: O outputs of a matrix, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from bitalloc.errors import BitallocError
from bitalloc.progress import Progress
from bitalloc.schemes import Matrix, QuantLinear, Scheme, apply
from bitalloc.schemes.ladder import Bench, ends, parse
from bitalloc.store import JSON, digest
from bitalloc.suites import Head
from bitalloc.tables import LAYERWISE

ALL, QUANTISE, PROTECT = "all", "quantise", "protect"


class _Part(NamedTuple):
    matrix: Matrix | None
    name: str
    rows: slice


def layerwise(bench: Bench) -> pd.DataFrame:
    """LAYERWISE of every scheme that the configuration names; each measurement is a shard as soon as it is known."""
    schemes = parse(bench.settings, bench.settings.layerwise)
    parts = [part for matrix in bench.scope.matrices for part in _parts(matrix)]
    progress = Progress("layerwise", len(schemes) * (1 + 2 * len(parts)), unit="modules")
    rows = []
    for scheme in schemes:
        if scheme.quant_backend != "simulated":
            raise BitallocError(f"schemes.layerwise: modules are spared in our simulation, {scheme.name} is not of it")
        whole: JSON = {}
        for mode, part, record in _measured(bench, scheme, parts, progress):
            whole = record if mode == ALL else whole
            rows.append(_row(bench, scheme, mode, part, (record, whole)))
    return pd.DataFrame(rows)[LAYERWISE.names]


def _parts(matrix: Matrix) -> list[_Part]:
    """The matrix, and its row blocks where it has several."""
    units = [_Part(matrix, unit.name.removeprefix(f"{matrix.layer}."), unit.rows) for unit in matrix.units]
    return [_Part(matrix, ALL, slice(0, matrix.rows)), *(units if len(units) > 1 else [])]


def _measured(
    bench: Bench, scheme: Scheme, parts: list[_Part], progress: Progress
) -> Iterator[tuple[str, _Part, JSON]]:
    model = head = None
    rows = sum(matrix.rows for matrix in bench.scope.matrices)
    works = [(ALL, _Part(None, ALL, slice(0, rows)))] + [(mode, part) for mode in (QUANTISE, PROTECT) for part in parts]
    for mode, part in works:
        layer = part.matrix.layer if part.matrix else ""
        key = digest(["layerwise", bench.identity, scheme.key(), mode, layer, part.name])
        record = bench.store.get(key)
        progress.advance(0 if record is None else 1, cached=True)
        if record is None:
            if model is None:
                model = bench.load()
                calibration = bench.calibration if scheme.calibrated else None
                apply(model, scheme, calibration=calibration, seed=bench.seed, keep=True)
            _keep(model, bench.scope.matrices, mode, part)
            head = head or Head(model)  # takes passes of its own, and no module of the scheme is in it
            record = bench.scores(model, head)
            bench.store.put(key, record)
            progress.advance(note=f"{scheme.name} {mode} {layer} {part.name}")
        yield mode, part, record


def _keep(model: Any, matrices: tuple[Matrix, ...], mode: str, part: _Part) -> None:
    """Let the original weights and inputs make the outputs that are not to be quantised."""
    for matrix in matrices:
        module = model.get_submodule(matrix.layer)
        assert isinstance(module, QuantLinear)
        kept_O = torch.full((matrix.rows,), mode == QUANTISE, device=module.What_OI.device)
        if matrix is part.matrix:
            kept_O[part.rows] = mode == PROTECT
        module.kept_O = kept_O if kept_O.any() else None


def _row(bench: Bench, scheme: Scheme, mode: str, part: _Part, records: tuple[JSON, JSON]) -> dict[str, Any]:
    """`records` of the model and of the whole scheme."""
    record, whole = records
    matrix, tokens_W = part.matrix, record["tokens"]
    place = {"layer": matrix.layer, "block": matrix.block, "role": matrix.role} if matrix else {}
    saved = dict.fromkeys(ends("saved_nats_per_token"))
    if mode == PROTECT:
        saved = ends("saved_nats_per_token", bench.mean(np.subtract(whole["kl"], record["kl"]), tokens_W))
    return {
        **({"layer": "", "block": -1, "role": ""} | place),
        "scheme": scheme.name,
        "mode": mode,
        "part": part.name,
        "rows": part.rows.stop - part.rows.start,
        **ends("kl_nats_per_token", bench.mean(record["kl"], tokens_W)),
        **saved,
        "n_tokens": int(sum(tokens_W)),
        "n_windows": len(tokens_W),
        "scope_digest": bench.scope.digest,
        "protocol": bench.protocol,
    }
