"""Records: what was measured, one row a number, with all that it depends on -> RECORDS, and the folder of a run.

A run is `runs/<run_id>/`: `config_resolved.yaml`, `metrics.jsonl` (a JSON object a row), `metrics.parquet` (the same
rows), `plots/`. Its id follows from its configuration and the model, so that equal work has one place: what stands
there is gone on with, and other work under the same id is refused.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bitalloc.errors import BitallocError
from bitalloc.lock import Lock
from bitalloc.provenance import commit, run_record
from bitalloc.store import canonical, digest, write_atomically
from bitalloc.tables import RECORDS

Row = dict[str, Any]
OK = "ok"
COLUMNS = tuple(RECORDS.names)
SPREAD = ("value", "lo", "hi", "q25", "q75", "n")  # how many iterations fit depends on the clock too

# every metric, with its meaning
TIMES = {
    "load_s": "seconds from files, read before or not, to a model on the device",
    "compile_s": "seconds that the first generation takes above a later one, where the model is compiled",
    "cold_ttft_ms": "the first prompt after loading, before any warm-up, compilation included",
    "ttft_ms": "time to the first token: the prompt is read and one token chosen",
    "tpot_ms": "time per output token after the first: (latency - TTFT) / (N - 1)",
    "itl_ms": "latency between two tokens, the median of a generation",
    "latency_ms": "prompt and N tokens",
    "prefill_tokens_per_s": "B L / TTFT",
    "decode_tokens_per_s": "B (N - 1) / (latency - TTFT)",
    "prefill_speedup": "TTFT of the first variant over this one's, round by round",
    "decode_speedup": "TPOT of the first variant over this one's, round by round",
    "usd_per_million_input_tokens": "at prefill_tokens_per_s",
    "usd_per_million_output_tokens": "at decode_tokens_per_s",
    "runtime_s": "seconds that the scoring took, loading not counted",
    "tokens_per_s": "tokens that were scored or read a second",
}
SIZES = {
    "libraries_mem_mb": "peak memory of the process before it loads (CPU): Python and libraries; MB = 10^6 bytes",
    "load_mem_mb": "peak memory while it loads; on a GPU what was allocated, on a CPU the high-water mark of RSS",
    "prefill_mem_mb": "peak memory while it reads the prompt",
    "decode_mem_mb": "peak memory while it writes",
    "load_reserved_mb": "as load_mem_mb, what torch had reserved (GPU)",
    "prefill_reserved_mb": "as prefill_mem_mb, what torch had reserved (GPU)",
    "decode_reserved_mb": "as decode_mem_mb, what torch had reserved (GPU)",
}
SCORES = {
    "nbytes": "bytes of all that the model keeps in memory, as its tensors count them",
    "ppl": "exp of the mean of nll_nats_per_token",
    "nll_nats_per_token": "-1/n sum log q(token)",
    "n_tokens": "tokens that were scored",
    "accuracy": "share of items answered right, Wilson's interval",
    "key_nll_nats": "-log q of the key's tokens, summed",
    "retention": "share right of the items that the reference has right",
}
METRICS = TIMES | SIZES | SCORES
VARYING = frozenset(TIMES | SIZES)  # their numbers differ between two equal runs on one machine; all else is equal


def rows(frame: pd.DataFrame) -> list[Row]:
    """Plain rows of a RECORDS frame, as JSON has them: None where a value is missing, whole numbers as such."""
    whole = {column.name for column in RECORDS.columns if str(column.type) == "int64"}
    return [
        {name: None if pd.isna(row[name]) else int(row[name]) if name in whole else row[name] for name in COLUMNS}
        for row in frame.astype(object).to_dict("records")
    ]


def frame(found: Iterable[Row]) -> pd.DataFrame:
    """A RECORDS frame of rows that may lack columns."""
    table = pd.DataFrame([[row.get(name) for name in COLUMNS] for row in found], columns=list(COLUMNS), dtype=object)
    if unknown := set(table["metric"]) - set(METRICS):
        raise BitallocError(f"unknown metric {min(unknown)!r}; name it in records.METRICS")
    return table


def machine(device: str) -> Row:
    """The columns of RECORDS that tell of the machine and the software; the device is not touched."""
    packages = ("torch", "transformers", "torchao", "bitsandbytes", "compressed-tensors", "mamba-ssm", "numpy")
    versions = run_record(*packages)
    del versions["commit"]
    told = "; ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    row: Row = {"git_commit": commit(), "host": platform.node(), "device": device, "versions": told}
    if device == "cuda":
        name, driver = _nvidia()
        torch = sys.modules.get("torch")  # what only reads records does without it
        row |= {"gpu": name, "driver": driver, "cuda": torch.version.cuda if torch else None}
    return row


def _nvidia() -> tuple[str | None, str | None]:
    """Name and driver of the first GPU, if its tool tells."""
    if not (tool := shutil.which("nvidia-smi")):
        return None, None
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    name, _, driver = said[0].partition(", ") if said else ("", "", "")
    return name or None, driver or None


def run_id(settings: Mapping[str, Any], model_digest: str, seed: int) -> str:
    """Of what a run is, not of when: equal for equal configuration, model and seed.

    >>> run_id({"model": {"name": "tiny"}, "a": 1}, "d", 0) == run_id({"a": 1, "model": {"name": "tiny"}}, "d", 0)
    True
    """
    named = settings.get("model", {})
    name = str(named.get("name", "run")) if isinstance(named, Mapping) else str(named)
    return f"{name}-{digest([settings, model_digest, seed])[:12]}"


# ---- the folder of a run -------------------------------------------------------------------------------
class Run:
    """The rows of one run, kept on disk as they come."""

    def __init__(self, folder: Path, resolved: Mapping[str, Any]) -> None:
        """Begin the run, or go on with what stands there; raises `BitallocError` where that is another's."""
        self.folder, self.id = folder, folder.name
        place, text = folder / "config_resolved.yaml", yaml.safe_dump(dict(resolved), sort_keys=True)
        if place.exists():
            before = _yaml(place)
            if before != yaml.safe_load(text):
                off = sorted(key for key in {*before, *resolved} if before.get(key) != yaml.safe_load(text).get(key))
                raise BitallocError(
                    f"{folder} is another run: {', '.join(off)} differ from its config_resolved.yaml; give another "
                    "--run-id, or remove the folder"
                )
        else:
            write_atomically(place, text.encode())
        (folder / "plots").mkdir(exist_ok=True)
        self.rows: list[Row] = []

    def has(self, stage: str, variant: str | None = None) -> bool:
        """Whether rows of that stage, and of that variant, are there."""
        return any(row["stage"] == stage and variant in (None, row["variant"]) for row in self.rows)

    def add(self, fresh: Sequence[Row]) -> None:
        """Keep these rows too: the JSON first, whole, then the Parquet of the same rows."""
        self.rows += rows(frame([{"run_id": self.id, "notes": "", **row} for row in fresh]))
        self.write()

    def write(self) -> None:
        lines = "".join(canonical({name: row[name] for name in COLUMNS}) + "\n" for row in self.rows)
        RECORDS.write(frame(self.rows), self.folder / "metrics.parquet")  # which refuses what is no record
        write_atomically(self.folder / "metrics.jsonl", lines.encode())

    @contextmanager
    def held(self) -> Iterator[Run]:
        """With the rows that are there; nobody else writes meanwhile."""
        lock = Lock(self.folder / ".lock")
        if not lock.take() and not lock.take():  # a void one is cleared away first
            raise BitallocError(f"another process writes {self.folder}; wait for it, or give another --run-id")
        try:
            if (self.folder / "metrics.jsonl").exists():
                self.rows = read_jsonl(self.folder / "metrics.jsonl")
                self.write()  # a kill between the two files is mended
            yield self
        finally:
            lock.release()


def read_jsonl(path: Path) -> list[Row]:
    """Rows of metrics.jsonl; raises `BitallocError` for what is no record."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(set(row) == set(COLUMNS) for row in found):
            return [{name: row[name] for name in COLUMNS} for row in found]
    except FileNotFoundError:
        raise BitallocError(f"{path} does not exist; give the folder of a run, runs/<run_id>") from None
    except (OSError, ValueError, TypeError):
        pass
    raise BitallocError(f"{path} does not hold records of this version; remove the folder and run it again")


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise BitallocError(f"{path} cannot be read; remove the folder and run it again")
    return found
