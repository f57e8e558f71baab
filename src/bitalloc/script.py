"""What every script of the workflow does around its pure `main`: its files, threads, a log, one line on bad input."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bitalloc.config import Config
from bitalloc.errors import BitallocError
from bitalloc.provenance import run_record
from bitalloc.store import write_atomically


class Job:
    """What a rule hands to its script, as `main` takes it."""

    def __init__(self, snakemake: Any) -> None:
        self._snakemake = snakemake

    @property
    def inputs(self) -> dict[str, Path]:
        """Single files and folders by name; absent where the configuration asks for none."""
        return _files(self._snakemake.input)

    @property
    def outputs(self) -> dict[str, Path]:
        return _files(self._snakemake.output)

    @property
    def output(self) -> Path:
        """The only output, or the first."""
        return Path(self._snakemake.output[0])

    @property
    def settings(self) -> Config:
        """The sections that the rule names; all others have their defaults."""
        return Config(**self._snakemake.params.settings)

    @property
    def remote_code(self) -> bool:
        return self._snakemake.params.sheet["remote_code"]


def _files(named: Any) -> dict[str, Path]:
    return {name: Path(path) for name, path in named.items() if path and isinstance(path, str)}


@contextmanager
def stage(snakemake: Any) -> Iterator[Job]:
    """Run a script's body as one stage of the workflow.

    `BitallocError` becomes one line on stderr and exit status 1; anything else keeps its traceback. The
    log holds the rule, its wildcards, the versions it ran with, and either the seconds it took or the error.
    (Snakemake's `benchmark:` may not stand beside `cache:`, so scripts take their time themselves.)
    """
    start = time.perf_counter() - time.process_time()  # imports lie behind: they count by their CPU seconds
    log = Path(snakemake.log[0])
    record = {
        "rule": snakemake.rule,
        "wildcards": dict(snakemake.wildcards.items()),
        "threads": snakemake.threads,
        **run_record("torch", "transformers", "snakemake"),
    }
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(snakemake.threads)
    try:
        _write(log, record)
        yield Job(snakemake)
        _write(log, record | {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time()})
    except BitallocError as error:
        line = f"error: {snakemake.rule}: {error}"
    except Exception:
        _append(log, traceback.format_exc())
        raise
    else:
        return
    _append(log, line + "\n")
    print(line, file=sys.stderr, flush=True)
    sys.exit(1)


def _write(log: Path, record: dict[str, Any]) -> None:
    write_atomically(log, (json.dumps(record, indent=1) + "\n").encode())


def _append(log: Path, text: str) -> None:
    with suppress(OSError), log.open("a") as file:  # a full or read-only disk is what the text is about
        file.write(text)
