"""One matrix under one option is an experiment: computed once, kept in the store, never computed again.

A shard is addressed by what determines it (weights, moments, option, settings, code), not by the model's
name. Missing options of a matrix are computed in stacks; an option's result does not depend on the stack,
so a run that was killed and resumed ends in the same bytes as one that was not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bitalloc.config import Config, Sweep, parse_bytes
from bitalloc.errors import BitallocError, nearest
from bitalloc.lowrank import Decomposition, Factor, decompose, stacks
from bitalloc.models import Checkpoint, open_checkpoint, pick_device, read_moment
from bitalloc.option import PASS_THROUGH, Option
from bitalloc.option import options as configured
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant import CompressedMatrix, quantizer
from bitalloc.store import JSON, Store, digest
from bitalloc.tables import INVENTORY, MOMENTS, SWEEP

STACKED_BYTES = 16  # for each weight and option: target or residual, whitened residual, codes, their successors


class Experiments:
    """Errors and compressed matrices of a model's claimed layers, from the store or computed.

    Raises `BitallocError` for unknown layers and quantisers, for weights or moments that are missing, NaN or
    of the wrong shape, and for results that are not finite.
    """

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        inventory: pd.DataFrame,
        moments: pd.DataFrame,
        store: Store,
        sweep: Sweep,
        device: torch.device,
    ) -> None:
        self.checkpoint, self.store, self.sweep, self.device = checkpoint, store, sweep, device
        claimed = inventory[inventory["claimed"]]
        self.layers: dict[str, dict[str, Any]] = {row["layer"]: row for row in claimed.to_dict("records")}
        self.moments: dict[str, dict[str, Any]] = {row["site"]: row for row in moments.to_dict("records")}
        self.keep = sweep.keep_matrices if isinstance(sweep.keep_matrices, bool) else self._small_enough()
        self._code = source_digest("bitalloc.lowrank", "bitalloc.quant")
        self._factor: tuple[str, Factor] | None = None
        self._workspace = parse_bytes(sweep.workspace)
        self._said = False

    def rows(self, layers: list[str], options: list[Option], progress: Progress | None = None) -> pd.DataFrame:
        """The errors [SWEEP] of `layers` x `options` in that order; what is missing is computed and stored."""
        progress = progress or Progress("sweep", len(layers) * len(options))
        found = []
        for layer in layers:
            records = self._records(layer, options, progress)
            found += [self._row(layer, option, records[option]) for option in options]
        return pd.DataFrame(found, columns=[column.name for column in SWEEP.columns])

    def stored(self, layers: Iterable[str], options: Sequence[Option]) -> int:
        """How many of `layers` x `options` stand in the store; only `rows` finds out whether they are sound."""
        return sum(self._key(layer, option) in self.store for layer in layers for option in options)

    def matrix(self, layer: str, option: Option) -> CompressedMatrix:
        """The compressed matrix: from the store when it is kept there, else computed, to the same bytes."""
        row, key = self._layer(layer), self._key(layer, option)
        path = self.store.tensors(key) if self.store.get(key) is not None else None
        if path is not None:
            try:
                return CompressedMatrix.from_tensors(option, row["rows"], row["columns"], load_file(path))
            except (OSError, SafetensorError):  # another process is replacing the shard
                pass
        [(_, result, _)] = self._compute(layer, [option], self._weight(layer))
        return result.matrix

    def H(self, site: str) -> Tensor:  # noqa: N802 - the name of the paper
        """The moment matrix H_II of a site, float32, on the CPU."""
        if site not in self.moments:
            raise BitallocError(f"no moments of the site {site!r}; rerun calibrate for this checkpoint")
        return read_moment(self.store, self.moments[site]["key"])

    def _layer(self, layer: str) -> dict[str, Any]:
        if layer not in self.layers:
            raise BitallocError(f"no claimed matrix {layer!r}: {nearest(layer, self.layers)}")
        return self.layers[layer]

    def _key(self, layer: str, option: Option) -> str:
        row = self._layer(layer)
        if row["site"] not in self.moments:
            raise BitallocError(f"no moments of the site {row['site']!r}; rerun calibrate for this checkpoint")
        content: dict[str, Any] = {"weights": row["digest"], "option": option.key(), "code": self._code}
        content["moments"] = self.moments[row["site"]]["digest"]
        content |= {name: getattr(self.sweep, name) for name in ("damping", "act_order", "iterations")}
        return digest(content)

    def _records(self, layer: str, options: Sequence[Option], progress: Progress) -> dict[Option, JSON]:
        keys = {option: self._key(layer, option) for option in options}
        for name in dict.fromkeys(option.quantizer for option in options if option.quantizer != PASS_THROUGH):
            quantizer(name)

        def stored() -> dict[Option, JSON]:
            records = {option: self.store.get(key) for option, key in keys.items()}
            return {option: record for option, record in records.items() if record is not None}

        records = stored()
        if len(records) < len(options):
            waiting = f"[sweep] another process computes {layer}; waiting for it"
            with self.store.lock(digest(sorted(keys.values())), waiting):
                records = stored()
                progress.advance(len(records), cached=True)
                missing = [option for option in options if option not in records]
                W_OI = self._weight(layer)
                energy, output = float(W_OI.square().sum(dtype=torch.float64)), self._site_factor(layer).energy(W_OI)
                for option, result, wall_s in self._compute(layer, missing, W_OI):
                    record = {
                        "nbytes": option.nbytes(*W_OI.shape),
                        "mse": result.square / W_OI.numel(),
                        "nmse": _share(result.square, energy),
                        "rel_error": _share(result.error, output),
                        "weight_energy_ratio": _share(result.energy, energy),
                        "wall_s": wall_s,
                    }
                    if not all(math.isfinite(value) for value in record.values()):
                        raise BitallocError(
                            f"the error of {layer} at {option.name} is not finite; check its weights and moments"
                        )
                    tensors = save(result.matrix.tensors()) if self.keep else None
                    self.store.put(keys[option], record, tensors)
                    records[option] = record
                    progress.advance(note=layer)
        else:
            progress.advance(len(records), cached=True)
        return records

    def _compute(
        self, layer: str, options: Sequence[Option], W_OI: Tensor
    ) -> Iterator[tuple[Option, Decomposition, float]]:
        """Option, result and seconds of each option, stack by stack; a stack too large for memory is halved."""
        factor = self._site_factor(layer)
        half = torch.bfloat16 if self._layer(layer)["dtype"].lower() in ("bf16", "bfloat16") else torch.float16
        todo = stacks(options)
        while todo:
            most = max(1, self._workspace // (STACKED_BYTES * W_OI.numel()))
            turn, rest, start = todo[0][:most], todo[0][most:], time.perf_counter()
            settings = {"act_order": self.sweep.act_order, "iterations": self.sweep.iterations}
            try:
                results = decompose(W_OI, factor, turn, half=half, **settings)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._halve(layer, turn, W_OI.numel())
                continue
            wall_s = (time.perf_counter() - start) / len(turn)
            yield from ((option, result, wall_s) for option, result in zip(turn, results, strict=True))
            todo[:1] = [rest] if rest else []

    def _halve(self, layer: str, turn: list[Option], weights: int) -> None:
        if len(turn) == 1:
            raise BitallocError(
                f"not enough memory for {layer} at {turn[0].name} alone; use a machine with more, or device: cpu"
            ) from None
        self._workspace = len(turn) // 2 * STACKED_BYTES * weights
        if not self._said:
            self._said = True
            print(
                f"[sweep] out of memory with {len(turn)} options of {layer}: going on with half as many at a time; "
                "a lower sweep.workspace avoids this",
                file=sys.stderr,
                flush=True,
            )

    def _weight(self, layer: str) -> Tensor:
        W_OI, row = self.checkpoint.weight(layer), self._layer(layer)
        if tuple(W_OI.shape) != (row["rows"], row["columns"]):
            raise BitallocError(
                f"{layer} is {list(W_OI.shape)}, the inventory says [{row['rows']}, {row['columns']}]; rerun retrieve"
            )
        return W_OI.to(self.device)

    def _site_factor(self, layer: str) -> Factor:
        """The factor of the layer's site; one is held, and layers of a site come one after another."""
        site = self._layer(layer)["site"]
        if self._factor is None or self._factor[0] != site:
            self._factor = None
            H_II, columns = self.H(site), self._layer(layer)["columns"]
            if tuple(H_II.shape) != (columns, columns):
                raise BitallocError(
                    f"moments of {site} are {list(H_II.shape)}, but {layer} has {columns} inputs; rerun calibrate"
                )
            self._factor = (site, Factor(H_II.to(self.device), self.sweep.damping, name=site))
        return self._factor[1]

    def _row(self, layer: str, option: Option, record: JSON) -> dict[str, Any]:
        row = self._layer(layer)
        place = {name: row[name] for name in ("model", "layer", "block", "role", "kind", "site")}
        chosen = {name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
        return {**place, **chosen, **record, "key": self._key(layer, option)}

    def _small_enough(self) -> bool:
        options = configured(self.sweep)
        total = sum(option.nbytes(row["rows"], row["columns"]) for row in self.layers.values() for option in options)
        return total <= parse_bytes(self.sweep.keep_limit)


def _share(part: float, whole: float) -> float:
    """part / whole; a matrix of zeros that is stored exactly has no error."""
    return 0.0 if part == 0 else part / whole if whole else math.inf


def _out_of_memory(error: BaseException) -> bool:
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in message


def open_experiments(
    path_to_checkpoint: Path, path_to_inventory: Path, path_to_moments: Path, settings: Config
) -> Experiments:
    """The experiments of a model whose checkpoint.json, INVENTORY and MOMENTS lie at these paths."""
    return Experiments(
        checkpoint=open_checkpoint(path_to_checkpoint),
        inventory=INVENTORY.read(path_to_inventory),
        moments=MOMENTS.read(path_to_moments),
        store=Store(Path(settings.store)),
        sweep=settings.sweep,
        device=pick_device(settings.device),
    )
