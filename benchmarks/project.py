"""bitalloc on one model as a user runs it: snakemake in a copy of the workflow, with a store of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from running import FailedError, Took, threaded, timed
from safetensors.torch import save_file

from bitalloc.config import budget_slug
from bitalloc.families import FAMILIES
from bitalloc.formats.bitalloc import Reader
from bitalloc.models import context_length, read_config
from bitalloc.provenance import source_digest
from bitalloc.tables import COSTS, INVENTORY, PLAN, TOKENS

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "workflow", "scripts", "config", "profiles", "envs")
MODEL = "bench"  # its name in the sheet of the copy
# the lean run of somebody who wants a checkpoint: no random pool, no arms, no other texts; a NO-GO is noted. Codes are
# learned by the defaults: the sheet of `tiny` has the few steps of the demo. Bits beyond four for budgets beyond four
LEAN: dict[str, dict[str, Any]] = {
    "retrieve": {"items": {}},
    "sweep": {"bits": [2, 3, 4, 5, 6]},
    "sensitivity": {"signals": ["kl"]},
    "allocate": {"pool": 0, "arms": []},
    "evaluate": {"suites": ["perplexity", "divergence"], "protocols": [], "jobs": 1},
    "gates": {"mode": "warn"},
}
STRATEGIES = ("best", "uniform", "tuned")
QUALITY = "quality"  # `tuned` with the settings that spend more, config/best.yaml


def plan_of(strategy: str) -> str:
    """The strategy of the workflow behind a row of ours."""
    return "tuned" if strategy == QUALITY else strategy


@dataclass(frozen=True)
class Subject:
    """A model to quantise: its folder, the row of the sheet and the corpora that the sheet does not have."""

    name: str
    path: Path
    row: dict[str, Any]
    corpora: dict[str, Any]

    @cached_property
    def content(self) -> str:
        """Digest of the files of the model, wherever it lies."""
        whole = hashlib.sha256()
        for file in sorted(file for file in self.path.iterdir() if file.suffix in (".json", ".safetensors")):
            whole.update(file.name.encode() + b"\0" + file.read_bytes())
        return whole.hexdigest()


def subject(model: str, text: Path | None = None) -> Subject:
    """A model of the sheet by its name, or any folder. Without `text` a folder gets WikiText-2, or docstrings where
    BITALLOC_DATA has none.
    """
    sheet = yaml.safe_load((ROOT / "config/models.yaml").read_text())["models"]
    if model in sheet:
        row = sheet[model]
        path = Path(os.path.expandvars(row.get("path", "")))
        if not row.get("path") or not (ROOT / path).is_dir():
            raise SystemExit(f"{model}: no folder {path}; fetch it, or set BITALLOC_DATA, then name the folder")
        settings = {
            name: dict(values) if isinstance(values, dict) else values for name, values in row["settings"].items()
        }
    else:
        path, settings = Path(model), {}
        if not path.is_dir():
            raise SystemExit(f"{model} is neither a model of config/models.yaml nor a folder")
        row, settings = _described(path), _settings(path, text)
    corpora = {"text": {"sources": [str(text.resolve())], "separator": ""}} if text else {}
    if text:
        settings["retrieve"] = settings["retrieve"] | {split: ["text"] for split in ("calibrate", "select", "report")}
    path = (ROOT / path).resolve()
    name = model if model in sheet else path.name
    return Subject(name, path, {**row, "path": str(path), "settings": settings}, corpora)


def _described(path: Path) -> dict[str, Any]:
    """Family and blocks by config.json."""
    raw = read_config(path)
    architectures = set(raw.get("architectures") or ())
    found = [name for name, family in FAMILIES.items() if architectures & set(family.architectures)]
    if not found:
        raise SystemExit(f"{path}: no family of bitalloc has {', '.join(architectures)}; add it to families.py")
    return {"family": found[0], "blocks": raw.get("num_hidden_layers", raw.get("n_layer"))}


def _settings(path: Path, text: Path | None) -> dict[str, Any]:
    longest = min(2048, context_length(read_config(path)) or 2048)
    retrieve: dict[str, Any] = {"window": longest, "calibrate_windows": 128, "select_windows": 16, "report_windows": 32}
    data = os.environ.get("BITALLOC_DATA")
    if not text and not (data and (Path(data) / "wikitext2").is_dir()):
        retrieve = {"window": min(256, longest), "calibrate_windows": 32, "select_windows": 8, "report_windows": 12}
        retrieve |= {split: ["docstrings"] for split in ("calibrate", "select", "report")}
    # group size as an option is worth more than rank (docs/LOG.md)
    return {"retrieve": retrieve, "sweep": {"group_sizes": [32, 64, 128], "ranks": [0]}}


class Project:
    """A copy of the workflow in `folder` with one model in its sheet."""

    def __init__(
        self,
        folder: Path,
        subject: Subject,
        *,
        seed: int,
        threads: int,
        limit_s: float,
        over: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """`over`: sections whose settings depart from those of the model."""
        self.folder, self.subject, self.seed, self.limit_s, self.over = folder, subject, seed, limit_s, over or {}
        self.threads, self.results = threads, folder / "results" / MODEL
        self.calls = 0
        for part in PARTS:
            source, target = ROOT / part, folder / part
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    def run(self, *targets: str, budgets: list[str] = (), plans: list[str] = ()) -> Took:  # type: ignore[assignment]
        """Make these files of `results/bench/`, by snakemake and with one set of budgets and plans, see STRATEGIES."""
        settings = {name: dict(values) if isinstance(values, dict) else values
                    for name, values in self.subject.row["settings"].items()}  # fmt: skip
        settings.pop("tune", None)
        for name, values in [*LEAN.items(), *self.over.items()]:
            settings[name] = {**settings.get(name, {}), **values}
        settings["threads"] = self.threads
        if budgets:
            settings["allocate"] |= {"budgets": list(budgets)}
            settings["compress"] = {"plans": [plan_of(strategy) for strategy in plans]}
        if QUALITY in plans:
            more = yaml.safe_load((ROOT / "config/best.yaml").read_text())
            for name in ("sensitivity", "sweep", "allocate", "tune"):
                settings[name] = {**settings.get(name, {}), **more[name]}
        sheet = {"models": {MODEL: {**self.subject.row, "settings": settings}}}
        (self.folder / "config/models.yaml").write_text(yaml.safe_dump(sheet))
        overlay = self.folder / "config/bench.yaml"
        overlay.write_text(yaml.safe_dump({"seed": self.seed, "corpora": self.subject.corpora}))
        self.calls += 1
        command = [sys.executable, "-m", "snakemake", *(f"results/{MODEL}/{target}" for target in targets)]
        command += ["--cores", str(self.threads), "--rerun-incomplete", "--nolock"]
        command += ["--configfile", str(overlay)]
        log = self.folder / f"snakemake-{self.calls}.log"
        try:
            return timed(
                command, log=log, environ=threaded(self.threads, ours=True), limit_s=self.limit_s, cwd=self.folder
            )
        except FailedError:
            raise FailedError(_reason(log)) from None

    def identity(self) -> dict[str, Any]:
        """What everything that this project makes depends on, beside budgets."""
        code = source_digest("bitalloc.compress", "bitalloc.allocate", "bitalloc.calibrate", "bitalloc.evaluate")
        row = {**self.subject.row, "path": self.subject.content}
        return {"row": row, "corpora": self.subject.corpora, "seed": self.seed, "code": code}

    def tokens(self) -> pd.DataFrame:
        return TOKENS.read(self.results / "tokens.parquet")

    def layers(self) -> dict[str, list[int]]:
        """Linear layers -> [O, I] as the model's own module has it."""
        inventory = INVENTORY.read(self.results / "inventory.parquet")
        claimed = inventory[inventory["claimed"]]
        return {row.layer: [int(row.rows), int(row.columns)] for row in claimed.itertuples()}

    def reach(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest plan."""
        (costs,) = [COSTS.read(file) for file in sorted(self.results.glob("costs.*.parquet"))[:1]]
        sizes = costs.groupby("layer")["nbytes"]
        return int(sizes.min().sum()), int(sizes.max().sum())

    def export(self, strategy: str, budget: str, folder: Path) -> dict[str, Any]:
        """Write What of a checkpoint, dequantised, to `folder`; says what it stores and how it was chosen."""
        name = f"{plan_of(strategy)}-{budget_slug(budget)}"
        reader = Reader(self.results / "models" / name)
        layers = self.layers()
        weights = {layer: reader.tensor(f"{layer}.weight").float().contiguous() for layer in layers}
        save_file(weights, folder / "weights.safetensors")
        stored: dict[str, dict[str, list[Any]]] = {layer: {} for layer in layers}
        for file in reader.manifest["files"]:
            for tensor in reader.stored(file):
                layer, _, part = tensor.name.rpartition(".")
                if layer in stored:
                    stored[layer][part] = [tensor.dtype, list(tensor.shape)]
        plans = pd.read_parquet(self.results / "plans.parquet").set_index("plan")
        return {"stored": stored, "setting": str(plans["note"].get(name, ""))}

    def map(self, budget: str) -> dict[str, dict[str, int]]:
        """Layer -> bits and group size of the plan without rank."""
        for strategy in ("bits_only", "optimal"):
            file = self.results / "plans" / f"{strategy}-{budget_slug(budget)}.parquet"
            if file.is_file():
                plan = PLAN.read(file)
                if not plan["rank"].any():
                    return {row["layer"]: {"bits": int(row["bits"]), "group_size": int(row["group_size"]) or -1}
                            for row in plan.to_dict("records")}  # fmt: skip
        raise FailedError("no plan without rank at this budget")


def _reason(log: Path) -> str:
    """The line of a log of snakemake that says what was wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (told or lines or ["it said nothing"])[0][:300] + f" ({log})"
