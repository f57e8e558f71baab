"""Calibrate: second moments H_II = X^T X / n of every site's input, block by block.

The model is never there as a whole: hidden states of all windows are carried through one block at a time,
whose weights come from the checkpoint and go again. The states that enter a block lie in scratch files
beside the store, so a killed run goes on at its first unfinished block. Axes: T tokens, I inputs, N windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import nn

from bitalloc.config import Calibrate
from bitalloc.errors import BitallocError
from bitalloc.families import Family
from bitalloc.models import Checkpoint, panels, read_config, working_dtype
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import JSON, Store, digest
from bitalloc.stream import Scratch, Stream, scratch
from bitalloc.tables import MOMENTS

Batches = tuple[torch.Tensor, ...]


def calibrate(
    *,
    path: Path,
    family: Family,
    tokens: pd.DataFrame,
    inventory: pd.DataFrame,
    settings: Calibrate,
    store: Store,
    device: torch.device,
) -> pd.DataFrame:
    """Moments of all sites over the calibrate windows: a MOMENTS frame; H_II [I, I] float32 goes to `store`.

    With `token_normalised` every token's input is scaled to unit length first, so that tr(H) = 1. A site
    whose shard is in the store is not computed again. Raises `BitallocError` for NaN or Inf in a moment.
    """
    chosen = tokens[tokens["split"] == "calibrate"]
    if chosen.empty:
        raise BitallocError("the tokens hold no window of the split calibrate; set retrieve.calibrate and rerun")
    ids_NT = torch.from_numpy(np.stack(chosen["tokens"].to_list()).astype(np.int64))
    sites = inventory[inventory["claimed"]].drop_duplicates("site").sort_values("block", kind="stable")
    identity = {
        "stage": "calibrate",
        "weights": digest(sorted(zip(inventory["tensor"], inventory["digest"], strict=True))),
        "config": digest(read_config(path)),
        "tokens": digest(ids_NT.tolist()),
        "settings": settings.model_dump(),
        "dtype": str(working_dtype(device)),
        "code": source_digest("bitalloc.calibrate"),
    }
    keys = {site: digest({**identity, "site": site}) for site in sites["site"]}
    records = {site: store.get(key) for site, key in keys.items()}
    if None in records.values():
        batches, work = ids_NT.split(settings.batch), digest(identity)
        with (
            store.lock(work, "[calibrate] another process calibrates this model; waiting for it"),
            scratch(store.root / "scratch" / work) as folder,
        ):
            records = {site: store.get(key) for site, key in keys.items()}
            missing = sites[[records[site] is None for site in sites["site"]]]
            stream, states = Stream(Checkpoint(path, family), device), Scratch(folder, len(batches))
            for block, moments in _moments(stream, batches, states, missing, settings.token_normalised):
                for site, moment in moments.items():
                    records[site] = moment.put(store, keys[site], site=site, block=block)
    return pd.DataFrame([records[site] for site in sites["site"]], columns=MOMENTS.names)


def _moments(
    stream: Stream, batches: Batches, states: Scratch, missing: pd.DataFrame, token_normalised: bool
) -> Iterator[tuple[int, dict[str, _Moment]]]:
    """(block, site -> moment) of the missing sites, rows of INVENTORY."""
    if missing.empty:  # another process was first
        return
    first, last = int(missing["block"].min()), int(missing["block"].max())
    start = max((block for block in range(first + 1) if states.has(block)), default=-1)
    stream.enter(batches, into=states if start < 0 else None)
    start = max(start, 0)
    progress = Progress("calibrate", last + 1 - start, unit="blocks")
    for block in range(start, last + 1):
        moments, hooks = {}, []
        for row in missing[missing["block"] == block].itertuples():
            moment = _Moment(row.columns, token_normalised=token_normalised, device=stream.device)
            hooks.append(stream.model.get_submodule(row.layer).register_forward_pre_hook(moment.hook))
            moments[row.site] = moment
        with torch.no_grad(), stream.filled(block):
            for batch in range(len(batches)):
                hidden = stream.run(block, states.read(block, batch))
                if block < last:
                    states.write(block + 1, batch, hidden)
        for hook in hooks:  # the model would hold the sums of all blocks
            hook.remove()
        yield block, moments
        states.drop(block)
        progress.advance()


class _Moment:
    """The running sum of x x^T over the tokens of one site: panels in float64, as much as H_II in float32."""

    def __init__(self, dim: int, *, token_normalised: bool, device: torch.device) -> None:
        self.token_normalised, self.device, self.n_tokens = token_normalised, device, 0
        self.panels = panels(dim)
        self.sums = [
            torch.zeros(rows.stop - rows.start, dim - rows.start, dtype=torch.float64, device=device)
            for rows in self.panels
        ]

    def hook(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        X_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if self.token_normalised:
            X_TI = nn.functional.normalize(X_TI, dim=1)
        for place, rows in enumerate(self.panels):
            self.sums[place] += X_TI[:, rows].T @ X_TI[:, rows.start :]
        self.n_tokens += len(X_TI)

    def put(self, store: Store, key: str, *, site: str, block: int) -> JSON:
        """Store H_II and let go of the sum; returns its row of MOMENTS."""
        held = {}
        for rows in self.panels:
            held[f"H_{rows.start}"] = panel = (self.sums.pop(0) / self.n_tokens).float().cpu()
            if not panel.isfinite().all():
                raise BitallocError(
                    f"the inputs of site {site} hold NaN or Inf: weights before it are damaged or overflow as "
                    f"{working_dtype(self.device)}; fetch the checkpoint again"
                )
        diagonal_I = torch.cat([panel.diagonal() for panel in held.values()]).double()
        floor = torch.finfo(torch.float32).tiny  # inputs that are always 0
        tensors = save(held)
        record = {
            "site": site,
            "block": block,
            "dim": len(diagonal_I),
            "n_tokens": self.n_tokens,
            "trace": diagonal_I.sum().item(),
            "outlier_ratio": (diagonal_I.max() / diagonal_I.median().clamp_min(floor)).item(),
            "key": key,
            "digest": hashlib.sha256(tensors).hexdigest(),
        }
        store.put(key, record, tensors)
        return record
