"""Windows of tokens carried through the blocks of a model of which one block, or the embeddings, is ever filled.

The states that enter a block lie in scratch files, so that a killed run goes on at its first unfinished block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.func import functional_call

from bitalloc.errors import BitallocError
from bitalloc.models import Checkpoint, drop, materialise, set_weight, skeleton, working_dtype
from bitalloc.store import write_atomically

Call = tuple[tuple[Any, ...], dict[str, Any]]
Weights = Mapping[str, torch.Tensor]
NONE: Weights = MappingProxyType({})


class Scratch:
    """Hidden states on their way: one file for each batch and the block that it enters next."""

    def __init__(self, folder: Path, batches: int) -> None:
        self.folder, self.batches = folder, batches

    def _file(self, block: int, batch: int) -> Path:
        return self.folder / f"{block:04d}" / f"{batch:05d}.safetensors"

    def has(self, block: int) -> bool:
        return all(self._file(block, batch).exists() for batch in range(self.batches))

    def write(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        write_atomically(self._file(block, batch), save({"hidden": hidden.contiguous().cpu()}))

    def read(self, block: int, batch: int, window: slice = slice(None)) -> torch.Tensor:
        """What enters `block`: of a batch, or of a window in it."""
        with safe_open(self._file(block, batch), framework="pt") as file:
            return file.get_slice("hidden")[window]

    def drop(self, block: int) -> None:
        shutil.rmtree(self.folder / f"{block:04d}", ignore_errors=True)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for the scratch of one piece of work; it stays when the run breaks off."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitallocError(f"cannot write {folder}: {error.strerror}; free space or fix permissions") from None
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class _Recorded(Exception):  # noqa: N818 - a signal, no error
    """Every block has been called; carries the hidden states, which no block has changed."""


class Stream:
    """A model's embeddings and blocks, to be run one at a time."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device, self.family = checkpoint, device, checkpoint.family
        self.model = skeleton(checkpoint.path, device=device)
        self.blocks = self.model.get_submodule(self.family.blocks)
        self.calls: dict[int, list[Call]] = {}  # windows of a batch -> how each block is called

    @torch.no_grad()
    def enter(self, batches: Sequence[torch.Tensor], into: Scratch | None = None, tables: Weights = NONE) -> None:
        """Learn how blocks are called on batches of these sizes; `into` takes what enters block 0, of all of them.

        Without padding the further arguments (masks, rotations) depend on the shape of a batch alone, so one batch of
        each size is enough. `tables` has embeddings W_OI that stand in for those of the checkpoint, by layer.
        """
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.family.blocks}.")]
        embeddings = {name.rpartition(".")[0] for name in names if self.family.claim(name)[2] == "embedding"}
        for name in sorted(embeddings):
            self._fill(name)
            if name in tables:
                set_weight(self.model, self.family, name, tables[name])
        for batch, ids in enumerate(batches):
            if into is not None or len(ids) not in self.calls:
                hidden, recorded = self._record(ids.to(self.device))
                self.calls.setdefault(len(ids), recorded)
                if into is not None:
                    into.write(0, batch, hidden)
        for name in embeddings:
            drop(self.model.get_submodule(name))

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

    @contextmanager
    def filled(self, block: int) -> Iterator[nn.Module]:
        """The block with its weights, for as long as it is needed."""
        self._fill(f"{self.family.blocks}.{block}")
        yield self.blocks[block]
        drop(self.blocks[block])

    def run(self, block: int, hidden: torch.Tensor, weights: Weights = NONE) -> torch.Tensor:
        """What leaves a filled block; `weights`, by their names in it, stand in for its own."""
        args, kwargs = self.calls[len(hidden)][block]
        out = functional_call(self.blocks[block], dict(weights), (hidden.to(self.device), *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _fill(self, name: str) -> None:
        module, dtype = self.model.get_submodule(name), working_dtype(self.device)
        materialise(module, name, self.checkpoint, device=self.device, dtype=dtype)
