"""Validate: run every study that this machine can run, and end in one table of what was claimed and what came of it.

`make validate`, or `python -m bitalloc.validate [STUDY ...] [-- arguments of snakemake]`. A model is left out, with the
reason, where neither disk, cache nor hub has it or where it does not fit the memory; a study where a corpus is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bitalloc.config import Config, Model, Study, expand, load, read_study
from bitalloc.corpus import HUB_REASONS, HUB_TIMEOUT_S, UnavailableError, find
from bitalloc.errors import BitallocError, nearest
from bitalloc.tables import CRITERIA

STUDIES = Path("config/studies")
SPACE = 3.0  # times the bytes of a checkpoint of 16 bits: float32 on a CPU, hidden states, a second head
COLUMNS = ("study", "criterion", "model", "value", "interval", "verdict", "why")


def unavailable(model: Model) -> str:
    """Why the model cannot be run here; empty when it can. Nothing is downloaded."""
    if model.path is not None:
        folder = expand(model.path)
        if model.path.startswith("results/trained/") or (folder is not None and Path(folder).is_dir()):
            return ""
        if model.hub is None:
            return f"{model.path}: {'an environment variable is not set' if folder is None else 'no such folder'}"
    try:
        nbytes = _hub_nbytes(model)
    except UnavailableError as reason:
        return f"{model.hub}: {reason}"
    memory = _memory()
    if SPACE * nbytes > memory:
        return f"{model.hub}: about {SPACE * nbytes / 1e9:.0f} GB of memory are needed, {memory / 1e9:.0f} GB are here"
    return ""


def _hub_nbytes(model: Model) -> int:
    """Bytes of the weights files in the cache, else on the hub; raises `UnavailableError`."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download

    where = {"revision": model.revision}
    try:
        folder = Path(snapshot_download(model.hub, local_files_only=True, allow_patterns=["*.safetensors"], **where))
        if files := list(folder.glob("*.safetensors")):
            return sum(file.stat().st_size for file in files)
    except (OSError, ValueError):
        pass
    try:
        found = HfApi().model_info(model.hub, timeout=HUB_TIMEOUT_S, files_metadata=True, **where).siblings or []
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UnavailableError(HUB_REASONS.get(type(error).__name__, HUB_REASONS["LocalEntryNotFoundError"])) from None
    return sum(file.size or 0 for file in found if file.rfilename.endswith(".safetensors"))


def _memory() -> int:
    """Bytes of memory that models can have: the GPU's where there is one."""
    from bitalloc.models import pick_device, total_memory

    return total_memory(pick_device("auto"))


def missing_corpus(study: Study, config: Config) -> str:
    """Why a corpus of the study cannot be had; empty when all can. Files of the hub are fetched."""
    for name in study.corpora:
        tried = []
        for source in config.corpora[name].sources:
            try:
                if source not in ("world", "docstrings"):
                    find(source)
                break
            except UnavailableError as reason:
                tried.append(f"{source} ({reason})")
        else:
            return f"corpus {name}: {', '.join(tried)}"
    return ""


def validate(names: Sequence[str], config: Config, arguments: Sequence[str]) -> tuple[pd.DataFrame, bool]:
    """(the table of all studies, all that was started went through)."""
    known = {path.stem: read_study(path, config) for path in sorted(STUDIES.glob("*.yaml"))}
    for name in names:
        if name not in known:
            raise BitallocError(f"unknown study {name!r}: {nearest(name, known)}")
    chosen = {name: study for name, study in known.items() if not names or name in names}
    why = {name: unavailable(config.model(name)) for name in {model for s in chosen.values() for model in s.models}}
    skip, parts, targets = {name: reason for name, reason in why.items() if reason}, [], {}
    for name, study in chosen.items():
        there = [model for model in study.models if model not in skip]
        reason = missing_corpus(study, config) if there else _together(study.models, skip)
        if reason:
            print(f"[validate] {name}: skipped, {reason}", file=sys.stderr, flush=True)
            parts.append(pd.DataFrame([{"study": name, "criterion": "all", "verdict": "not run", "why": reason}]))
        else:
            targets[name] = Path(f"results/studies/{name}/criteria.parquet")
    status = 0
    if targets:
        given = list(arguments)
        at = given.index("--config") if "--config" in given else len(given)
        given[at : at + 1] = ["--config", f"skip={json.dumps(skip, sort_keys=True)}"]
        command = [sys.executable, "-m", "snakemake", *map(str, targets.values()), "--keep-going", *given]
        status = subprocess.run(command, check=False).returncode
    for name, path in targets.items():
        if status and not path.exists():
            parts.append(pd.DataFrame([{"study": name, "criterion": "all", "verdict": "failed", "why": "see above"}]))
        else:
            parts.append(CRITERIA.read(path).assign(study=name))
    return pd.concat(parts, ignore_index=True), status == 0


def _together(models: Sequence[str], why: Mapping[str, str]) -> str:
    """
    >>> _together(["a", "b", "c"], {"a": "hub/a: not here", "b": "b: no such folder", "c": "hub/c: not here"})
    'hub/a, hub/c: not here; b: no such folder'
    """
    found: dict[str, list[str]] = {}
    for model in models:
        place, _, reason = why[model].partition(": ")
        found.setdefault(reason, []).append(place)
    return "; ".join(f"{', '.join(places)}: {reason}" for reason, places in found.items())


def told(table: pd.DataFrame) -> str:
    """The table as text, and how often each verdict."""
    rows = [COLUMNS, *map(_cells, table.astype(object).where(table.notna(), "").to_dict("records"))]
    widths = [max(len(row[k]) for row in rows) for k in range(len(COLUMNS) - 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    counts = table["verdict"].value_counts()
    return "\n".join([*lines, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    measured = row.get("value", "") != ""
    value, interval = (f"{row['value']:.3g}", f"[{row['lo']:.3g}, {row['hi']:.3g}]") if measured else ("", "")
    of_ppl = " (PPL)" if row["criterion"].startswith("early") and row["metric"] == "ln_ppl_ratio" else ""
    place = row["study"], row["criterion"] + of_ppl, row.get("model", "")
    return *place, value, interval, row["verdict"], row["why"]


def main(arguments: Sequence[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    names, rest = arguments[:at], arguments[at + 1 :]
    try:
        table, fine = validate(names, load(Path("config/config.yaml"), Path("config/models.yaml")), rest)
    except BitallocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(told(table))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
