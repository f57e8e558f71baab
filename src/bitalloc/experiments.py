"""One matrix under one option is an experiment: computed once, kept in the store, never computed again.

A shard is addressed by what determines it (weights, moments, option, settings, code), not by the model's
name. Missing experiments of the matrices that read one input are computed in stacks; a result does not
depend on the stack, so a run that was killed and resumed ends in the same bytes as one that was not.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bitalloc import precision
from bitalloc.config import Config, Sweep, parse_bytes
from bitalloc.errors import BitallocError, nearest
from bitalloc.lowrank import Decomposition, Factor, Target, compress, stacks, working_bytes
from bitalloc.models import Checkpoint, open_checkpoint, pick_device, read_moment
from bitalloc.option import ABSMAX, PASS_THROUGH, Option, from_row
from bitalloc.option import options as configured
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.quant import CompressedMatrix, quantizer
from bitalloc.quant.absmax import absmax
from bitalloc.store import JSON, Store, digest
from bitalloc.tables import EMBEDDINGS, INVENTORY, MOMENTS, SWEEP

Pair = tuple[str, Option]  # layer and option: an experiment


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
        embeddings: pd.DataFrame | None = None,
    ) -> None:
        """`embeddings` is an EMBEDDINGS frame: what it holds was computed by that stage and is only read here."""
        self.checkpoint, self.store, self.sweep, self.device = checkpoint, store, sweep, device
        found = [] if embeddings is None else embeddings.to_dict("records")
        self.tables: dict[str, dict[Option, str]] = {}  # layer -> option -> shard
        for row in found:
            self.tables.setdefault(row["layer"], {})[from_row(row, sweep)] = row["key"]
        claimed = inventory[inventory["claimed"]]
        self.layers: dict[str, dict[str, Any]] = {row["layer"]: row for row in claimed.to_dict("records")}
        self.moments: dict[str, dict[str, Any]] = {row["site"]: row for row in moments.to_dict("records")}
        self.keep = sweep.keep_matrices if isinstance(sweep.keep_matrices, bool) else self._small_enough()
        self.inventory = inventory
        self._code = source_digest("bitalloc.lowrank", "bitalloc.quant")
        self._factor: tuple[str, Factor] | None = None
        self._workspace = parse_bytes(sweep.workspace)
        self._said = False

    def rows(self, layers: list[str], options: list[Option], progress: Progress | None = None) -> pd.DataFrame:
        """The errors [SWEEP] of `layers` x `options` in that order; what is missing is computed and stored."""
        progress = progress or Progress("sweep", len(layers) * len(options))
        records: dict[Pair, JSON] = {}
        for _, site in itertools.groupby(layers, key=lambda layer: self._layer(layer)["site"]):
            records |= self._records([(layer, option) for layer in site for option in options], progress)
        found = [self._row(layer, option, records[layer, option]) for layer in layers for option in options]
        return pd.DataFrame(found, columns=SWEEP.names)

    def stored(self, layers: Iterable[str], options: Sequence[Option]) -> int:
        """How many of `layers` x `options` stand in the store; only `rows` finds out whether they are sound."""
        return sum(self._key(layer, option) in self.store for layer in layers for option in options)

    def shard(self, layer: str, option: Option) -> str:
        """The shard of one experiment, computed if it is not there; that of an embedding or head is known.

        What needs no moments is no experiment: it is made from the weights whenever it is asked for, and this is its
        identity.
        """
        if self.free(layer, option):
            if layer not in self.digests:
                raise BitallocError(f"no matrix {layer!r}: {nearest(layer, self.digests)}")
            return digest([self.digests[layer], option.key(), source_digest("bitalloc.quant.absmax")])
        if layer in self.tables:
            return self.tables[layer][option]
        return self.rows([layer], [option])["key"].item()

    def matrix(self, layer: str, option: Option) -> CompressedMatrix:
        """The compressed matrix: from the store when it is kept there, else computed, to the same bytes."""
        if self.free(layer, option):
            return self._made(layer, option)
        if layer in self.tables:
            return self._table(layer, option)
        row, key = self._layer(layer), self._key(layer, option)
        path = self.store.tensors(key) if self.store.get(key) is not None else None
        if path is not None:
            try:
                return CompressedMatrix.from_tensors(option, row["rows"], row["columns"], load_file(path))
            except (OSError, SafetensorError):  # another process is replacing the shard
                pass
        [(_, result, _, _)] = self._compute([(layer, option)], matrices=True)
        assert result.matrix is not None
        return result.matrix

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the weights that any plan may round: claimed matrices, embeddings and heads."""
        return precision.rounded(self.inventory).set_index("layer")["digest"].to_dict()

    def free(self, layer: str, option: Option) -> bool:
        """The matrix can be stored so without a look at moments: by its own largest weights, or as it is."""
        measured = layer in self.tables or (layer in self.layers and self.layers[layer]["site"] in self.moments)
        return option.quantizer == ABSMAX or (option.quantizer == PASS_THROUGH and not measured)

    def _made(self, layer: str, option: Option) -> CompressedMatrix:
        W_OI = self.checkpoint.weight(layer)
        if option.quantizer == ABSMAX:
            return absmax(W_OI, option)
        stored = self.checkpoint.tensor(f"{layer}.weight").dtype
        half = stored if stored == torch.bfloat16 else torch.float16
        return CompressedMatrix(option, *W_OI.shape, weight_OI=W_OI.to(half))

    def _table(self, layer: str, option: Option) -> CompressedMatrix:
        stored = self.checkpoint.tensor(f"{layer}.weight")
        if option.quantizer == PASS_THROUGH:
            half = stored.dtype if stored.dtype == torch.bfloat16 else torch.float16
            return CompressedMatrix(option, *stored.shape, weight_OI=stored.to(half))
        key = self.tables[layer][option]
        path = self.store.tensors(key) if self.store.get(key) is not None else None
        if path is None:
            self.store.forget()
            raise BitallocError(
                f"the codes of {layer} at {option.name} are missing from {self.store.root} or damaged; "
                "delete embeddings.parquet and rerun"
            )
        return CompressedMatrix.from_tensors(option, *stored.shape, load_file(path))

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

    def _records(self, pairs: Sequence[Pair], progress: Progress) -> dict[Pair, JSON]:
        """The records of experiments at one site."""
        keys = {pair: self._key(*pair) for pair in pairs}
        for name in {option.quantizer: None for _, option in pairs if option.quantizer != PASS_THROUGH}:
            quantizer(name)

        def stored() -> dict[Pair, JSON]:
            records = {pair: self.store.get(key) for pair, key in keys.items()}
            return {pair: record for pair, record in records.items() if record is not None}

        records = stored()
        if len(records) == len(pairs):
            progress.advance(len(records), cached=True)
            return records
        waiting = f"[sweep] another process computes {pairs[0][0]}; waiting for it"
        with self.store.lock(digest(sorted(keys.values())), waiting):
            records = stored()
            progress.advance(len(records), cached=True)
            missing = [pair for pair in pairs if pair not in records]
            for pair, result, target, wall_s in self._compute(missing, matrices=self.keep):
                layer, option = pair
                row = self._layer(layer)
                record = {
                    "nbytes": option.nbytes(row["rows"], row["columns"]),
                    "mse": result.square / (row["rows"] * row["columns"]),
                    "nmse": _share(result.square, target.energy),
                    "rel_error": _share(result.error, target.output(option)),
                    "weight_energy_ratio": _share(result.energy, target.energy),
                    "wall_s": wall_s,
                }
                if not all(math.isfinite(value) for value in record.values()):
                    raise BitallocError(
                        f"the error of {layer} at {option.name} is not finite; check its weights and moments"
                    )
                tensors = save(result.matrix.tensors()) if self.keep and result.matrix is not None else None
                self.store.put(keys[pair], record, tensors)
                records[pair] = record
                progress.advance(note=layer)
        return records

    def _compute(self, pairs: Sequence[Pair], *, matrices: bool) -> Iterator[tuple[Pair, Decomposition, Target, float]]:
        """Each experiment of a site with its result and seconds, a stack that fits the workspace at a time."""
        targets: dict[str, Target] = {}
        for stack in stacks(pairs):
            done = 0
            while done < len(stack):
                turn, start = self._fitting(stack[done:]), time.perf_counter()
                wanted = {layer for layer, _ in turn}
                targets = {layer: target for layer, target in targets.items() if layer in wanted}
                try:
                    for layer in wanted - targets.keys():
                        targets[layer] = self._target(layer)
                    results = compress(
                        [(targets[layer], option) for layer, option in turn],
                        iterations=self.sweep.iterations,
                        matrices=matrices,
                    )
                except (MemoryError, RuntimeError) as error:
                    if not _out_of_memory(error):
                        raise
                    targets = {}
                    self._halve(turn)
                    continue
                wall_s, total = time.perf_counter() - start, sum(targets[layer].W_OI.numel() for layer, _ in turn)
                for (layer, option), result in zip(turn, results, strict=True):
                    target = targets[layer]
                    yield (layer, option), result, target, wall_s * target.W_OI.numel() / total
                done += len(turn)

    def _fitting(self, stack: Sequence[Pair]) -> list[Pair]:
        """As many experiments from the front as fit the workspace, at least one."""
        fits = (n for n in range(len(stack), 1, -1) if self._working_bytes(stack[:n]) <= self._workspace)
        return list(stack[: next(fits, 1)])

    def _working_bytes(self, turn: Sequence[Pair]) -> int:
        shapes = [(layer, self._layer(layer)["rows"], self._layer(layer)["columns"], option) for layer, option in turn]
        return working_bytes(shapes, iterations=self.sweep.iterations)

    def _halve(self, turn: list[Pair]) -> None:
        layer, option = turn[0]
        if len(turn) == 1:
            raise BitallocError(
                f"not enough memory for {layer} at {option.name} alone; use a machine with more, or device: cpu"
            ) from None
        self._workspace = self._working_bytes(turn[: len(turn) // 2])
        if not self._said:
            self._said = True
            print(
                f"[sweep] out of memory with {len(turn)} experiments at {layer}: going on with half as many at a "
                "time; a lower sweep.workspace avoids this",
                file=sys.stderr,
                flush=True,
            )

    def _target(self, layer: str) -> Target:
        half = torch.bfloat16 if self._layer(layer)["dtype"].lower() in ("bf16", "bfloat16") else torch.float16
        return Target(self._weight(layer), self._site_factor(layer), act_order=self.sweep.act_order, half=half)

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
            columns = self._layer(layer)["columns"]

            def read() -> Tensor:
                return self.H(site).to(self.device)

            H_II = read()
            if tuple(H_II.shape) != (columns, columns):
                raise BitallocError(
                    f"moments of {site} are {list(H_II.shape)}, but {layer} has {columns} inputs; rerun calibrate"
                )
            self._factor = (site, Factor(H_II, self.sweep.damping, name=site, reread=read))
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


def open_experiments(inputs: Mapping[str, Path], settings: Config) -> Experiments:
    """The experiments of the model whose `checkpoint`, `inventory`, `moments` and `embeddings` lie at these paths.

    Without moments there are only plans that need none (absmax, 16 bits), without EMBEDDINGS no option of theirs.
    """
    return Experiments(
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        moments=MOMENTS.read(inputs["moments"]) if "moments" in inputs else pd.DataFrame(columns=MOMENTS.names),
        store=Store(Path(settings.store)),
        sweep=settings.sweep,
        device=pick_device(settings.device),
        embeddings=EMBEDDINGS.read(inputs["embeddings"]) if "embeddings" in inputs else None,
    )
