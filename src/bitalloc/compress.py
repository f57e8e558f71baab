"""Compress: plans made real, one self-contained checkpoint each -> CHECKPOINTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import pandas as pd
import torch

from bitalloc import precision
from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.formats import bitalloc as checkpoints
from bitalloc.formats.layout import checkpoint_nbytes
from bitalloc.models import Checkpoint
from bitalloc.option import Option, from_row
from bitalloc.progress import Progress
from bitalloc.quant import CompressedMatrix
from bitalloc.store import Store, digest
from bitalloc.tables import CHECKPOINTS, MOMENTS


class Matrices(Protocol):
    """Where compressed matrices come from."""

    def shard(self, layer: str, option: Option) -> str: ...
    def matrix(self, layer: str, option: Option) -> CompressedMatrix: ...


def compress(
    plans: Mapping[str, pd.DataFrame],
    *,
    results: Path,
    experiments: Experiments,
    inventory: pd.DataFrame,
    verdicts: Sequence[Mapping] = (),
    tuned: Mapping[str, Matrices] = MappingProxyType({}),
) -> pd.DataFrame:
    """Write every PLAN frame as `<results>/models/<plan>`: a CHECKPOINTS frame.

    Matrices are those of `experiments`, or of `tuned` for a plan that is there.
    A checkpoint that stands there already, equal and intact, is kept. Raises `BitallocError` when another one
    stands there, and when the weights files on disk do not have the size that the plan promises.
    """
    progress = Progress("compress", len(plans), unit="checkpoints")
    rows = []
    for name, plan in plans.items():
        folder = Path("models") / name
        options = {row["layer"]: from_row(row, experiments.sweep) for row in plan.to_dict("records")}
        matrices = tuned.get(name, experiments)
        shards = {layer: matrices.shard(layer, option) for layer, option in options.items()}
        place = digest(str((results / folder).resolve()))
        with experiments.store.lock(place, f"[compress] another process writes {folder}; waiting for it"):
            checkpoints.save(
                results / folder,
                source=experiments.checkpoint,
                inventory=inventory,
                plan=plan,
                matrix=matrices.matrix,
                sweep=experiments.sweep,
                extra={"plan": name, "shards": shards, "verdicts": [dict(verdict) for verdict in verdicts]},
            )
        predicted = checkpoint_nbytes(inventory, plan, experiments.sweep)
        nbytes = sum(file.stat().st_size for file in (results / folder).glob("*.safetensors"))
        if nbytes != predicted:
            raise BitallocError(f"{results / folder} takes {nbytes} bytes, its plan promised {predicted}; report this")
        written = checkpoints.checkpoint_digest(results / folder)
        rows.append((name, folder.as_posix(), predicted, nbytes, written))
        progress.advance(note=name)
    return pd.DataFrame(rows, columns=CHECKPOINTS.names)


def compress_maps(
    maps: Mapping[str, Mapping[str, str]],
    *,
    results: Path,
    checkpoint: Checkpoint,
    inventory: pd.DataFrame,
    store: Store,
    device: torch.device,
) -> dict[str, Path]:
    """Write precision maps as checkpoints, which need no calibration: name -> folder, `<results>/models/<name>`."""
    experiments = Experiments(
        checkpoint=checkpoint,
        inventory=inventory,
        moments=pd.DataFrame(columns=MOMENTS.names),
        store=store,
        sweep=Sweep(),
        device=device,
    )
    known = precision.components(inventory)
    plans = {name: precision.plan(inventory, precision.parse(mapping, known)) for name, mapping in maps.items()}
    (results / "models").mkdir(exist_ok=True)
    compress(plans, results=results, experiments=experiments, inventory=inventory)
    return {name: results / "models" / name for name in maps}
