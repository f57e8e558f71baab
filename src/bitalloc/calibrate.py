"""Calibrate: second moments H_II = X^T X / n of every site's input, block by block.

The model is never there as a whole: hidden states of all windows are carried through one block at a time,
whose weights come from the checkpoint and go again. The states that enter a block lie in scratch files
beside the store, so a killed run goes on at its first unfinished block. Axes: T tokens, I inputs, N windows.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import nn

from bitalloc.config import Calibrate
from bitalloc.errors import BitallocError
from bitalloc.families import Family
from bitalloc.models import Checkpoint, drop, materialise, panels, read_config, skeleton, working_dtype
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import JSON, Store, digest, write_atomically
from bitalloc.tables import MOMENTS

Batches = tuple[torch.Tensor, ...]
Call = tuple[tuple[Any, ...], dict[str, Any]]


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
            _scratch(store.root / "scratch" / work, len(batches)) as scratch,
        ):
            records = {site: store.get(key) for site, key in keys.items()}
            missing = sites[[records[site] is None for site in sites["site"]]]
            stream = _Stream(Checkpoint(path, family), batches, scratch, device)
            for block, moments in stream.run(missing, token_normalised=settings.token_normalised):
                for site, moment in moments.items():
                    records[site] = moment.put(store, keys[site], site=site, block=block)
    columns = [column.name for column in MOMENTS.columns]
    return pd.DataFrame([records[site] for site in sites["site"]], columns=columns)


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


# ---- hidden states on disk ---------------------------------------------------------------------------
class _Scratch:
    """Hidden states on their way: one file for each batch and the block that it enters next."""

    def __init__(self, folder: Path, batches: int) -> None:
        self.folder, self.batches = folder, batches

    def _file(self, block: int, batch: int) -> Path:
        return self.folder / f"{block:04d}" / f"{batch:05d}.safetensors"

    def has(self, block: int) -> bool:
        return all(self._file(block, batch).exists() for batch in range(self.batches))

    def write(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        write_atomically(self._file(block, batch), save({"hidden": hidden.contiguous().cpu()}))

    def read(self, block: int, batch: int) -> torch.Tensor:
        return load_file(self._file(block, batch))["hidden"]

    def drop(self, block: int) -> None:
        shutil.rmtree(self.folder / f"{block:04d}", ignore_errors=True)


@contextmanager
def _scratch(folder: Path, batches: int) -> Iterator[_Scratch]:
    """The scratch of one calibration; it stays when the run breaks off."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitallocError(f"cannot write {folder}: {error.strerror}; free space or fix permissions") from None
    yield _Scratch(folder, batches)
    shutil.rmtree(folder, ignore_errors=True)


# ---- one block at a time -----------------------------------------------------------------------------
class _Recorded(Exception):  # noqa: N818 - a signal, no error
    """Every block has been called; carries the hidden states, which no block has changed."""


class _Stream:
    """Carries the windows through the blocks; only one block, or the embeddings, is ever filled."""

    def __init__(self, checkpoint: Checkpoint, batches: Batches, scratch: _Scratch, device: torch.device) -> None:
        self.checkpoint, self.batches, self.scratch, self.device = checkpoint, batches, scratch, device
        self.family = checkpoint.family
        self.model = skeleton(checkpoint.path, device=device)
        self.blocks = self.model.get_submodule(self.family.blocks)

    def run(self, missing: pd.DataFrame, *, token_normalised: bool) -> Iterator[tuple[int, dict[str, _Moment]]]:
        """(block, site -> moment) of the missing sites, rows of INVENTORY."""
        if missing.empty:  # another process was first
            return
        first, last = int(missing["block"].min()), int(missing["block"].max())
        start = max((block for block in range(first + 1) if self.scratch.has(block)), default=-1)
        with torch.inference_mode():
            calls = self._enter(fresh=start < 0)
        start = max(start, 0)
        progress = Progress("calibrate", last + 1 - start, unit="blocks")
        for block in range(start, last + 1):
            moments, hooks = {}, []
            for row in missing[missing["block"] == block].itertuples():
                moment = _Moment(row.columns, token_normalised=token_normalised, device=self.device)
                hooks.append(self.model.get_submodule(row.layer).register_forward_pre_hook(moment.hook))
                moments[row.site] = moment
            with torch.inference_mode():
                self._advance(block, calls, keep=block < last)
            for hook in hooks:  # the model would hold the sums of all blocks
                hook.remove()
            yield block, moments
            self.scratch.drop(block)
            progress.advance()

    def _enter(self, *, fresh: bool) -> dict[int, list[Call]]:
        """Embed the windows; returns how each block is called, by batch size.

        Without padding the further arguments (masks, rotations) depend on the shape of a batch alone, so
        one batch of each size is enough; a fresh run embeds all and writes what enters block 0.
        """
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.family.blocks}.")]
        embeddings = {name.rpartition(".")[0] for name in names if self.family.claim(name)[2] == "embedding"}
        for name in sorted(embeddings):
            self._fill(name)
        calls: dict[int, list[Call]] = {}
        for batch, ids in enumerate(self.batches):
            if fresh or len(ids) not in calls:
                hidden, recorded = self._record(ids.to(self.device))
                calls.setdefault(len(ids), recorded)
                if fresh:
                    self.scratch.write(0, batch, hidden)
        for name in embeddings:
            drop(self.model.get_submodule(name))
        return calls

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """What enters the first block on `ids`, and how the model calls its blocks; they are not run."""
        recorded: list[Call] = []

        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            recorded.append((args, kwargs))
            if len(recorded) == len(self.blocks):
                raise _Recorded(hidden)
            return hidden

        for block in self.blocks:
            block.forward = record
        try:
            self.model(ids, use_cache=False)
        except _Recorded as signal:
            return signal.args[0], recorded
        finally:
            for block in self.blocks:
                del block.forward
        raise AssertionError(f"{type(self.model).__name__} does not call its blocks in turn")

    def _advance(self, block: int, calls: dict[int, list[Call]], *, keep: bool) -> None:
        """Run one block on all batches; the hooks see its inputs, `keep` writes what enters the next."""
        self._fill(f"{self.family.blocks}.{block}")
        for batch, ids in enumerate(self.batches):
            args, kwargs = calls[len(ids)][block]
            out = self.blocks[block](self.scratch.read(block, batch).to(self.device), *args, **kwargs)
            if keep:
                self.scratch.write(block + 1, batch, out[0] if isinstance(out, tuple) else out)
        drop(self.blocks[block])

    def _fill(self, name: str) -> None:
        module, dtype = self.model.get_submodule(name), working_dtype(self.device)
        materialise(module, name, self.checkpoint, device=self.device, dtype=dtype)
