"""Content-addressed shards: what makes a long run survive a crash and a rerun start from cache.

A shard is one finished piece of work (one experiment, one plan's evaluation): a JSON record and, if
there is any, a safetensors file beside it. It is written under a temporary name, flushed and renamed, the
JSON last, so a shard either stands complete or not at all. The JSON carries a checksum of both; a shard
that does not match (truncated, flipped, foreign) is treated as absent and computed again.

A `Ledger` is a shard that grows: of work that has thousands of small results, one file instead of thousands.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from bitalloc.errors import BitallocError
from bitalloc.lock import Lock

JSON = Mapping[str, Any]


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value: equal for equal content, whatever the order of keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. NaN and Infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, flush it to disk and rename it into place."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise BitallocError(
            f"cannot write {path}: {error.strerror}; free space or fix permissions, then rerun"
        ) from None


def _tidy(path: Path) -> None:
    """Remove what processes of this machine that are no more have left of earlier attempts to write `path`."""
    for left in path.parent.glob(glob.escape(f".{path.name}.{platform.node()}.") + "[0-9]*.tmp"):
        try:
            os.kill(int(left.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except PermissionError:  # alive, and somebody else's
            continue


class Store:
    """A folder of shards, addressed by the digest of everything that determines their content."""

    def __init__(self, root: Path) -> None:
        self.root, self._said = root, False

    def path(self, key: str, suffix: str = ".json") -> Path:
        return self.root / key[:2] / f"{key}{suffix}"

    def identity(self) -> str:
        """This store and no other, not even a new one in its place: where it lies and a name drawn at random.

        Tables that point into the store may be kept elsewhere under this (Snakemake's cache does).
        """
        path = self.root / "id"
        if not path.exists():
            with self.lock(digest("id"), f"another process makes the store {self.root}; waiting for it"):
                if not path.exists():
                    write_atomically(path, uuid4().hex.encode())
        return f"{self.root.resolve()} {path.read_text()}"

    def forget(self) -> None:
        """A shard was lost that tables point to: those that are kept elsewhere must not be taken again."""
        with suppress(OSError):
            (self.root / "id").unlink()

    def __contains__(self, key: str) -> bool:
        """Whether a shard stands under `key`; whether it can be trusted, only `get` says."""
        return self.path(key).exists()

    def get(self, key: str) -> JSON | None:
        """The record under `key`, or None when there is none that can be trusted."""
        try:
            shard = json.loads(self.path(key).read_text())
            record, tensors = shard["record"], shard["tensors_sha256"]
            sound = shard["key"] == key and shard["record_sha256"] == digest(record)
            if sound and tensors is not None:
                sound = file_digest(self.path(key, ".safetensors")) == tensors
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if sound else None

    def tensors(self, key: str) -> Path | None:
        """Path of the tensors that belong to `key`, or None when the shard was kept without them."""
        path = self.path(key, ".safetensors")
        return path if path.exists() else None

    def put(self, key: str, record: JSON, tensors: bytes | None = None) -> None:
        """Store a record (JSON values only) and serialised safetensors, if any."""
        if tensors is not None:
            write_atomically(self.path(key, ".safetensors"), tensors)
        shard = {
            "key": key,
            "record": record,
            "record_sha256": digest(record),
            "tensors_sha256": None if tensors is None else hashlib.sha256(tensors).hexdigest(),
        }
        write_atomically(self.path(key), canonical(shard).encode())

    @contextmanager
    def lock(self, work: str, waiting: str) -> Iterator[None]:
        """One process at a time does `work` (a digest): not two runs, nor an orphan that outlived a kill -9.

        Who comes second says `waiting` on stderr, once, and waits; what the first did is in the store by then.
        """
        lock = Lock(self.root / "locks" / f"{work[:24]}.lock")
        try:
            lock.path.parent.mkdir(parents=True, exist_ok=True)
            while not lock.take():
                if not self._said:  # two that do the same meet at every step
                    self._said = True
                    print(waiting, file=sys.stderr, flush=True)
                time.sleep(0.1)
        except OSError as error:
            raise BitallocError(f"cannot write {lock.path}: {error.strerror}; free space or fix permissions") from None
        try:
            yield
        finally:
            lock.release()


class Ledger:
    """Records of many items under one key: a line of JSON with its checksum for each batch that was finished.

    A line is written at once and flushed, so a kill loses at most the batch that was being computed. Lines that do not
    match their checksum (truncated, flipped) are dropped, which is said once, and their items are computed again.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.path = store.path(key, ".jsonl")
        self.records: dict[str, JSON] = {}
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        sound = [line for line in lines if self._take(line)]
        if len(sound) < len(lines):
            lost = f"{len(lines) - len(sound)} of {len(lines)} batches in {self.path} are damaged"
            print(f"[store] {lost}; their items are computed again", file=sys.stderr, flush=True)
            write_atomically(self.path, b"".join(line + b"\n" for line in sound))

    def _take(self, line: bytes) -> bool:
        try:
            batch = json.loads(line)
            sound = batch["sha256"] == digest(batch["records"])
        except (ValueError, KeyError, TypeError):
            return False
        if sound:
            self.records |= batch["records"]
        return sound

    def add(self, records: Mapping[str, JSON]) -> None:
        """Keep the records of a finished batch."""
        line = canonical({"records": records, "sha256": digest(records)}).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one write a line: others may do the same work; a line that a file system tears is told by its checksum
            with self.path.open("ab", buffering=0) as file:
                file.write(line + b"\n")
                os.fsync(file.fileno())
        except OSError as error:
            raise BitallocError(
                f"cannot write {self.path}: {error.strerror}; free space or fix permissions, then rerun"
            ) from None
        self.records |= json.loads(line)["records"]  # what is used now is what will be read later
