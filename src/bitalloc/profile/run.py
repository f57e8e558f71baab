"""Measurements by hand, from one small file: perplexity, long context and profile of a model at several precisions.

The scripts eval_ppl, eval_long_context and profile_model take the same file and write the same run, `runs/<run_id>/`
(bitalloc/records.py). What is there already is not measured again; a run of another configuration or of other code
under that id is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bitalloc import config, passkey, retrieve
from bitalloc.config import Model, Run
from bitalloc.corpus import UnavailableError, hub, load_tokenizer
from bitalloc.errors import BitallocError, nearest
from bitalloc.families import FAMILIES
from bitalloc.formats.bitalloc import source_identity
from bitalloc.models import Checkpoint, pick_device, read_config
from bitalloc.profile import bench, records
from bitalloc.profile.records import OK, Row
from bitalloc.profile.variants import REFERENCE, Variant, calibrated, load, variants
from bitalloc.provenance import source_digest
from bitalloc.store import Store, digest
from bitalloc.suites import Head, Windows, intervals

SHEET = Path("config/models.yaml")


# ---- what is measured ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Subject:
    """A model that was found, and what is to be measured of it."""

    name: str
    path: Path
    revision: str
    run: Run
    inventory: pd.DataFrame
    checkpoint: Checkpoint

    @property
    def device(self) -> torch.device:
        return pick_device(self.run.device)

    def tokens(self, split: str, corpora: list[str], window: int, windows: int) -> pd.DataFrame:
        """TOKENS of one split: as the workflow cuts them, for these settings."""
        counts = {"calibrate_windows": windows, "select_windows": windows, "report_windows": windows}
        none: dict[str, list[str]] = {"calibrate": [], "select": [], "report": []}
        asked = {"seed": self.run.seed, "corpora": {k: v.model_dump() for k, v in self.run.corpora.items()}}
        found = retrieve.tokens(
            config.parse({**asked, "retrieve": {**none, split: corpora, "window": window, **counts}}), self.path
        )
        return found[found["split"] == split]

    def calibration(self) -> list[list[int]] | None:
        """Tokens [N, T] for schemes that need them."""
        if not calibrated(self.run.variants):
            return None
        asked = self.run.calibrate
        rows = self.tokens("calibrate", asked.corpora, asked.window, asked.windows)["tokens"]
        return [[int(token) for token in ids] for ids in rows]


def find(run: Run) -> Subject:
    """The model of a run; raises `BitallocError` with all that was tried."""
    sheet = config.load(SHEET).models if SHEET.exists() else {}
    if run.model in sheet:
        name, model = run.model, sheet[run.model]
        path, revision = retrieve.resolve(name, model)
    else:
        name, path, revision = _unlisted(run.model, sheet)
        model = _described(name, path)
    family = FAMILIES[model.family]
    inventory = retrieve.inventory(name, path, family)
    return Subject(name, path, revision, run, inventory, Checkpoint(path, family))


def _unlisted(given: str, sheet: Mapping[str, Model]) -> tuple[str, Path, str]:
    """(name, folder, revision) of a local folder or of a hub id."""
    expanded = config.expand(given)
    if expanded is not None and Path(expanded).is_dir():
        return Path(expanded).resolve().name, Path(expanded), "local"
    name, _, revision = given.partition("@")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            path = hub(name, revision=revision or "main", files=retrieve.FILES)
        except UnavailableError as reason:
            raise BitallocError(f"model {given!r}: no such folder, and on the hub: {reason}") from None
        return name.rpartition("/")[2], path, path.name
    raise BitallocError(f"model {given!r} is no folder, no hub id and no row of {SHEET}: {nearest(given, sheet)}")


def _described(name: str, path: Path) -> Model:
    """A row of the model sheet from config.json."""
    raw = read_config(path)
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise BitallocError(
            f"model {name}: {path}/config.json says {kind!r}, no known family: {nearest(kind, FAMILIES)}"
        )
    return Model(path=str(path), family=kind, blocks=raw.get("num_hidden_layers", raw.get("n_layer")))


# ---- stages: rows of RECORDS ---------------------------------------------------------------------------
Rows = Iterator[list[Row]]


def perplexity(subject: Subject, made: list[Variant], run: records.Run) -> Rows:
    """ppl = exp(mean nll) of every variant on every corpus: fixed split, windows and stride; a list of rows each."""
    asked = subject.run.perplexity
    frame = subject.tokens(asked.split, asked.corpora, asked.window, asked.windows)
    windows = Windows(frame, batch=asked.batch, device=subject.device, stride=asked.stride)
    shared = {"stage": "perplexity", "batch": asked.batch, "prompt_length": windows.longest, "stride": windows.stride}
    for variant in made:
        if run.has("perplexity", variant.name):
            continue
        try:
            loaded = load(variant)
        except BitallocError as refusal:
            facts, scores, runtime_s, status = {"simulated": False}, None, None, str(refusal)
        else:
            facts, status = {name: value for name, value in loaded.facts.items() if name != "nbytes"}, OK
            start = time.perf_counter()
            scores = windows.scores(Head(loaded.model), windows.hidden(loaded.model))
            runtime_s = time.perf_counter() - start
            del loaded
        rows: list[Row] = []
        for corpus in asked.corpora:
            of = {**shared, **facts, "variant": variant.name, "task": f"{corpus}/{asked.split}", "status": status}
            chosen = (windows.frame["corpus"] == corpus).to_numpy()
            rows += _perplexities(of, None if scores is None else scores[chosen], asked, subject.run.seed)
        read = None if scores is None or not runtime_s else int(scores["tokens"].sum()) / runtime_s
        whole = {**shared, **facts, "variant": variant.name, "task": f"all/{asked.split}", "status": status}
        rows += [
            {**whole, "metric": "runtime_s", "value": runtime_s},
            {**whole, "metric": "tokens_per_s", "value": read},
        ]
        yield rows


def _perplexities(of: Row, scores: pd.DataFrame | None, asked: config.Perplexity, seed: int) -> Iterator[Row]:
    if scores is not None and not scores["nll"].map(math.isfinite).all():
        scores, of = None, of | {"status": "the scores are NaN or Inf"}
    if scores is None:
        yield from ({**of, "metric": metric} for metric in ("ppl", "nll_nats_per_token", "n_tokens"))
        return
    groups = ["all"] * len(scores)
    at = intervals.mean(scores["nll"], scores["tokens"], groups, resamples=asked.resamples, seed=seed)
    ends = {"value": at.value, "lo": at.lo, "hi": at.hi}
    yield {**of, "metric": "ppl", **{name: math.exp(end) for name, end in ends.items()}, "n": at.n}
    yield {**of, "metric": "nll_nats_per_token", **ends, "n": at.n}
    yield {**of, "metric": "n_tokens", "value": float(scores["tokens"].sum()), "n": at.n}


def long_context(subject: Subject, made: list[Variant], run: records.Run) -> Rows:
    """Passkeys at lengths x depths, the same items for every variant; retention is over the reference."""
    if all(run.has("long_context", variant.name) for variant in made):
        return
    asked, tokenizer = subject.run.long_context, load_tokenizer(subject.path)
    settings = config.Passkey(**asked.model_dump(), schemes=[])
    everyone = made if REFERENCE in [v.name for v in made] else [_reference(made[0]), *made]
    facts: dict[str, Mapping[str, Any]] = {}

    def make(variant: Variant) -> Any:
        loaded = load(variant)
        facts[variant.name] = loaded.facts
        return loaded.model

    code, weights = source_digest("bitalloc.passkey", "bitalloc.profile.variants"), source_identity(subject.inventory)
    table = passkey.passkey(
        {variant.name: partial(make, variant) for variant in everyone},
        tokenizer,
        settings,
        bos=read_config(subject.path).get("bos_token_id"),
        seed=subject.run.seed,
        store=Store(Path(subject.run.store)),
        identities={v.name: digest([weights, code, v.name, v.calibration, v.device]) for v in everyone},
        device=subject.device,
    )
    new = passkey.TEMPLATES[asked.kind].new_tokens
    for variant in made:
        if variant.name not in facts:  # all its answers were in the store
            make(variant)
        told = {name: value for name, value in facts[variant.name].items() if name != "nbytes"}
        of = {**told, "stage": "long_context", "variant": variant.name, "gen_len": new, "task": f"passkey/{asked.kind}"}
        own = table[table["scheme"] == variant.name]
        yield [row for found in own.to_dict("records") for row in _passkeys(of, found)]


def _reference(variant: Variant) -> Variant:
    return Variant(REFERENCE, variant.source, variant.device, variant.threads, variant.remote_code)


def _passkeys(of: Row, found: Mapping[str, Any]) -> Iterator[Row]:
    """One row of PASSKEY as rows of RECORDS."""
    place = {"prompt_length": int(found["length"]), "depth": None if found["depth"] < 0 else float(found["depth"])}
    place |= {"template_hash": found["template_digest"], "template_version": str(found["template_version"])}
    for metric, n in (("accuracy", "n"), ("key_nll_nats", "n"), ("retention", "n_retained")):
        value, lo, hi = (found[name] for name in (metric, f"{metric}_lo", f"{metric}_hi"))
        absent = value is None or pd.isna(value)
        status = found["status"] if not absent or found["status"] != OK else "nothing to retain"
        ends = {"value": None if absent else float(value), "lo": lo, "hi": hi, "n": int(found[n])}
        yield {**of, **place, "metric": metric, **ends, "status": status}


def profile(subject: Subject, made: list[Variant], run: records.Run) -> Rows:
    """Speed and memory; all variants in one go, since they take turns."""
    if run.has("profile"):
        return
    settings = config.Profile(**subject.run.profile.model_dump(), variants=subject.run.variants)
    yield bench.profile(
        made,
        model=subject.name,
        settings=settings,
        run_id=run.id,
        revision=subject.revision,
        seed=subject.run.seed,
        notes=subject.run.notes,
    )


# ---- the command line ----------------------------------------------------------------------------------
Stage = Callable[[Subject, list[Variant], records.Run], Rows]


def measure(stage: Stage, asked: Run, runs: Path, run_id: str | None = None) -> records.Run:
    """Do what is missing of a stage; the run as it then stands."""
    subject = find(asked)
    torch.set_num_threads(asked.threads)
    resolved: dict[str, Any] = asked.model_dump(mode="json")
    weights = source_identity(subject.inventory)
    name = run_id or records.run_id({**resolved, "model": {"name": subject.name}}, weights, asked.seed)
    if name != Path(name).name or name.startswith("."):
        raise BitallocError(f"--run-id {name!r} is no name of a folder; letters, digits, - and _ do")
    resolved |= {"model_digest": weights, "revision": subject.revision, "code": source_digest("bitalloc.profile.run")}
    shared = {"model": subject.name, "revision": subject.revision, "seed": asked.seed, "notes": asked.notes}
    shared |= records.machine(subject.device.type)
    with (
        records.Run(runs / name, resolved).held() as run,
        variants(
            asked.variants,
            checkpoint=subject.checkpoint,
            inventory=subject.inventory,
            device=subject.device.type,
            threads=asked.threads,
            scratch=runs / name,
            calibration=subject.calibration(),
            seed=asked.seed,
        ) as made,
    ):
        for rows in stage(subject, made, run):
            run.add([{**shared, "status": OK, **row} for row in rows])
            said = sorted({row["variant"] for row in rows})
            print(f"[{rows[0]['stage']}] {', '.join(said)}: {len(rows)} records", file=sys.stderr, flush=True)
    return run


def command(stage: Stage, description: str | None, arguments: list[str] | None = None) -> int:
    """`--config FILE [--runs DIR] [--run-id ID]`: 0, or 1 and one line on stderr."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="what is measured, of which model; see config/runs/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--run-id", help="name of this one; default: follows from configuration, model and seed")
    given = parser.parse_args(arguments)
    try:
        run = measure(stage, config.read_run(given.config), given.runs, given.run_id)
    except BitallocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(run.folder)
    return 0
