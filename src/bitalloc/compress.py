"""Compress: plans made real, one self-contained checkpoint each -> CHECKPOINTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.formats import bitalloc as checkpoints
from bitalloc.formats.layout import checkpoint_nbytes
from bitalloc.option import from_row
from bitalloc.progress import Progress
from bitalloc.store import digest
from bitalloc.tables import CHECKPOINTS


def compress(
    plans: Mapping[str, pd.DataFrame],
    *,
    results: Path,
    experiments: Experiments,
    inventory: pd.DataFrame,
    verdicts: Sequence[Mapping] = (),
) -> pd.DataFrame:
    """Write every PLAN frame as `<results>/models/<plan>`: a CHECKPOINTS frame.

    A checkpoint that stands there already, equal and intact, is kept. Raises `BitallocError` when another one
    stands there, and when the weights files on disk do not have the size that the plan promises.
    """
    progress = Progress("compress", len(plans), unit="checkpoints")
    rows = []
    for name, plan in plans.items():
        folder = Path("models") / name
        options = {row["layer"]: from_row(row, experiments.sweep) for row in plan.to_dict("records")}
        shards = {layer: experiments.shard(layer, option) for layer, option in options.items()}
        place = digest(str((results / folder).resolve()))
        with experiments.store.lock(place, f"[compress] another process writes {folder}; waiting for it"):
            checkpoints.save(
                results / folder,
                source=experiments.checkpoint,
                inventory=inventory,
                plan=plan,
                matrix=experiments.matrix,
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
    return pd.DataFrame(rows, columns=[column.name for column in CHECKPOINTS.columns])
