"""Embeddings: what the embedding, and a head of its own, cost in KL at fewer bits -> EMBEDDINGS.

They are few and large, so nothing is predicted: every option is put on alone and measured. A table that the head
reads, tied or its own, is quantised against the second moment of the final hidden states, an embedding that only
looks rows up against none (H = 1): on a trained model that halves the KL of the first and raises that of the second
by a third (docs/LOG.md). Rows do not know of one another, so a table is quantised a slab at a time.

Legend: V vocabulary, D hidden width, N scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.lowrank import Target, compress
from bitalloc.models import Checkpoint, get_weight, load_model, set_weight
from bitalloc.option import PASS_THROUGH, Option, usual_group
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant import CompressedMatrix, Factor
from bitalloc.store import JSON, Store, digest
from bitalloc.suites import Head, Windows, intervals, spread
from bitalloc.tables import EMBEDDINGS

SLAB = 2**24  # weights that are quantised at a time
RESAMPLES = 2000


def options(sweep: config.Sweep) -> list[Option]:
    """What is offered: the first quantiser at `embedding_bits`, no rank, the group size nearest to 64.

    >>> [option.name for option in options(config.Sweep(embedding_bits=[4, 16], group_sizes=[32, 128]))]
    ['gptq-4b-g32-r0', 'none-16b-g0-r0']
    """
    place = (usual_group(sweep), 0, sweep.factor_bits, sweep.symmetric)
    coded = [Option(sweep.quantizers[0], bits, *place) for bits in sorted(set(sweep.embedding_bits)) if bits < 16]
    return coded + ([Option(PASS_THROUGH, 16, 0, 0)] if 16 in sweep.embedding_bits else [])


def tables(inventory: pd.DataFrame) -> pd.DataFrame:
    """The rows of INVENTORY that hold a row for each token of the vocabulary, stored once."""
    ends = inventory[inventory["kind"].isin(["embedding", "head"]) & inventory["tensor"].str.endswith(".weight")]
    return ends[~ends["tied"] & (ends["rows"] == ends["rows"].max())]


def embeddings(
    *,
    checkpoint: Checkpoint,
    inventory: pd.DataFrame,
    tokens: pd.DataFrame,
    sweep: config.Sweep,
    settings: config.Sensitivity,
    store: Store,
    device: torch.device,
    batch: int = 8,
    seed: int = 0,
    remote_code: bool = False,
) -> pd.DataFrame:
    """The EMBEDDINGS frame; codes and scores of every option are a shard as soon as they are known.

    Scores `settings.windows` windows of the calibrate split, evenly over it; `batch` windows a forward pass. Raises
    `BitallocError` for a table with NaN or Inf, and when a KL is NaN or Inf.
    """
    windows = Windows(spread(tokens, settings.windows), batch=batch, device=device)
    found, wanted = list(tables(inventory).itertuples()), options(sweep)
    own_head = any(row.kind == "head" for row in found)
    scored = [np.asarray(window).tolist() for window in windows.frame["tokens"]]
    code = source_digest("bitalloc.embeddings")
    base = digest([code, scored, sorted(inventory["digest"]), device.type, batch, sweep.damping, sweep.act_order])
    progress = Progress("embeddings", len(found) * len(wanted), unit="options")
    bench = _Bench(checkpoint, windows, remote_code=remote_code)
    rows, count_W = [], np.ones(len(windows.frame))
    for row in found:
        keys = {option: digest([base, row.layer, option.key()]) for option in wanted}
        records = {option: record for option, key in keys.items() if (record := store.get(key)) is not None}
        progress.advance(len(records), cached=True)
        missing = [option for option in wanted if option not in records]
        read_by_head = row.kind == "head" or not own_head
        for option, record, tensors in bench.measure(row.layer, missing, sweep, read_by_head=read_by_head):
            store.put(keys[option], record, tensors)
            records[option] = record
            progress.advance(note=f"{row.layer} at {option.bits} bits")
        for option in wanted:
            record = records[option]
            kl = intervals.mean(record["kl"], count_W, windows.frame["corpus"], resamples=RESAMPLES, seed=seed)
            rows.append(_row(row, option, kl, record["rel_error"]) | {"key": keys[option]})
    return pd.DataFrame(rows, columns=EMBEDDINGS.names)


def _row(row: Any, option: Option, kl: intervals.Interval, rel_error: float) -> dict[str, Any]:
    place = {"model": row.model, "layer": row.layer, "block": -1, "role": row.kind, "kind": row.kind}
    chosen = {name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
    # rounding of float32 may leave a KL a little below 0
    measured = {"rel_error": rel_error, "kl_nats_per_token": max(kl.value, 0.0), "lo": kl.lo, "hi": kl.hi}
    return place | chosen | measured | {"nbytes": option.nbytes(row.rows, row.columns)}


class _Bench:
    """The model and its windows, loaded when something has to be measured."""

    def __init__(self, checkpoint: Checkpoint, windows: Windows, *, remote_code: bool) -> None:
        self.checkpoint, self.windows, self.remote_code = checkpoint, windows, remote_code

    @cached_property
    def model(self) -> Any:
        return load_model(self.checkpoint.path, device=self.windows.device, remote_code=self.remote_code)

    @cached_property
    def head(self) -> Head:
        return Head(self.model)

    @cached_property
    def reference(self) -> tuple[list[torch.Tensor], Head]:
        """Final hidden states of the unquantised model, h_ND of every batch, in memory; and its head."""
        return [h_ND.cpu() for h_ND in self.windows.hidden(self.model)], self.head.fixed()

    def measure(
        self, layer: str, options: Sequence[Option], sweep: config.Sweep, *, read_by_head: bool
    ) -> Iterator[tuple[Option, JSON, bytes | None]]:
        """(option, its error and the KL of every window, its tensors to store) of one table."""
        if not options:
            return
        hidden, before = self.reference
        factor = Factor(self._moment(hidden, read_by_head=read_by_head), sweep.damping, name=layer)
        family, W_VD = self.checkpoint.family, get_weight(self.model, self.checkpoint.family, layer)
        for option, (matrix, rel_error) in self._quantise(layer, options, factor, sweep).items():
            set_weight(self.model, family, layer, matrix.dequantize())
            self.head.refresh()
            kl_W = self.windows.scores(self.head, self.windows.hidden(self.model), hidden, before)["kl"].to_numpy()
            set_weight(self.model, family, layer, W_VD)
            self.head.refresh()
            if not np.isfinite(kl_W).all():
                raise BitallocError(f"{layer} at {option.name} makes the model's scores NaN or Inf; check its weights")
            tensors = None if option.quantizer == PASS_THROUGH else save(matrix.tensors())
            yield option, {"rel_error": rel_error, "kl": kl_W.tolist()}, tensors

    def _moment(self, hidden: Sequence[torch.Tensor], *, read_by_head: bool) -> torch.Tensor:
        """H_DD of what the table multiplies: E[h h^T] over the scored positions for a head, 1 for a look-up."""
        D = hidden[0].shape[1]
        if not read_by_head:
            return torch.eye(D)
        total_DD = sum(h_ND.T.double() @ h_ND.double() for h_ND in hidden)
        return (total_DD / sum(map(len, hidden))).float()

    def _quantise(
        self, layer: str, options: Sequence[Option], factor: Factor, sweep: config.Sweep
    ) -> dict[Option, tuple[CompressedMatrix, float]]:
        """Each option's codes, on the CPU, and rel_error."""
        stored_VD = self.checkpoint.tensor(f"{layer}.weight")
        half = torch.bfloat16 if stored_VD.dtype == torch.bfloat16 else torch.float16
        parts: dict[Option, list[CompressedMatrix]] = {option: [] for option in options}
        errors, outputs = dict.fromkeys(options, 0.0), dict.fromkeys(options, 0.0)
        for slab_VD in stored_VD.split(max(1, SLAB // stored_VD.shape[1])):
            target = Target(slab_VD.float(), factor, act_order=sweep.act_order, half=half)
            if not target.W_OI.isfinite().all():
                raise BitallocError(f"tensor {layer}.weight holds NaN or Inf; fetch the checkpoint again")
            for option in options:
                [done] = compress([(target, option)], iterations=0)
                assert done.matrix is not None
                parts[option].append(done.matrix)
                errors[option] += done.error
                outputs[option] += target.output(option)
        share = {option: errors[option] / outputs[option] if errors[option] else 0.0 for option in options}
        return {option: (_joined(parts[option]), share[option]) for option in options}


def _joined(slabs: Sequence[CompressedMatrix]) -> CompressedMatrix:
    """Rows one below the other; none has a low-rank part."""
    whole = {
        name: torch.cat([getattr(slab, name) for slab in slabs])
        for name in ("codes_OI", "scale_OG", "zero_OG", "weight_OI")
        if getattr(slabs[0], name) is not None
    }
    return replace(slabs[0], rows=sum(slab.rows for slab in slabs), **whole)
