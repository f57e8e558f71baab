"""How a checkpoint comes to disk: in a hidden folder beside its place, flushed, renamed; one tensor in memory."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bitalloc.errors import BitallocError
from bitalloc.formats.layout import Stored, header

SMALL_FILES = ("*.json", "tokenizer*", "*.model", "merges.txt")  # copied along; the index of the source is not


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when all went well and goes away when not.

    Raises `BitallocError` when the disk is full or `folder` cannot be written, or appears meanwhile.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BitallocError(f"cannot write {folder}: {reason}; free space or fix permissions, then rerun") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the name `path` when all went well and goes away when not; raises as above."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BitallocError(f"cannot write {path}: {reason}; free space or fix permissions, then rerun") from None
    finally:
        temporary.unlink(missing_ok=True)


def write(
    path: Path, tensors: Sequence[Stored], get: Callable[[str], torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """A safetensors file of what `get` gives for each name, one tensor at a time; its size and SHA-256."""
    whole = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            whole.update(data)

        put(header(tensors, metadata))
        for stored in tensors:
            tensor = get(stored.name)
            if tensor.nbytes != stored.nbytes:
                raise BitallocError(
                    f"{stored.name} takes {tensor.nbytes} bytes, {stored.nbytes} were promised; report this"
                )
            put(tensor.contiguous().flatten().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    return {"nbytes": path.stat().st_size, "sha256": whole.hexdigest()}


def copy_small(source: Path, target: Path, *, without: Sequence[str] = ()) -> None:
    """Copy configuration and tokenizer along."""
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SMALL_FILES)
        if path.is_file() and wanted and not path.name.endswith(".index.json") and path.name not in without:
            shutil.copyfile(path, target / path.name)
