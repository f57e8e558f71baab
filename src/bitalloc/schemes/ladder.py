"""The ladder from 16 bits to W4A4: every scheme of weights and activations scored on the report windows -> SCHEMES.

Each scheme is applied to a fresh copy of the model, so they do not depend on each other; calibration windows are read
once. A finished scheme is a shard: a run that was killed goes on after it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.models import load_model, open_checkpoint, pick_device
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.schemes import Calibration, Scheme, Scope, apply, scope
from bitalloc.store import JSON, Store, digest
from bitalloc.suites import Head, Windows, intervals, spread
from bitalloc.tables import INVENTORY, SCHEMES, TOKENS

REFERENCE, MEASURED = "reference", "measured"
SCORES = ("nll", "kl", "top1", "tokens")


def parse(settings: config.Schemes, names: list[str]) -> list[Scheme]:
    """The schemes of these names; raises `BitallocError` for one that is none."""
    return [
        Scheme.parse(n, group_size=settings.group_size, percentile=settings.percentile) for n in dict.fromkeys(names)
    ]


class Bench:
    """The model, the windows it is scored on and what schemes are calibrated on, loaded when something is missing."""

    def __init__(
        self,
        *,
        path: Path,
        inventory: pd.DataFrame,
        tokens: pd.DataFrame,
        split: str,
        settings: config.Schemes,
        evaluate: config.Evaluate,
        store: Store,
        device: torch.device,
        seed: int = 0,
        remote_code: bool = False,
    ) -> None:
        self.path, self.settings, self.store, self.device = path, settings, store, device
        self.seed, self.remote_code = seed, remote_code
        self.draws = {"resamples": evaluate.resamples, "seed": seed}
        self.nbytes = int(inventory.loc[inventory["claimed"], "nbytes"].sum())  # of the unquantised matrices
        scored = tokens[tokens["split"] == split]
        self.windows = Windows(scored, batch=evaluate.batch, device=device, stride=evaluate.stride)
        self.calibrate = spread(tokens, settings.windows)
        read = [self.windows.keys, [np.asarray(ids).tolist() for ids in self.calibrate["tokens"]]]
        code = source_digest("bitalloc.schemes.ladder", "bitalloc.schemes.layerwise")
        self.identity = digest([sorted(inventory["digest"]), read, seed, device.type, evaluate.batch, code])

    def load(self) -> Any:
        return load_model(self.path, device=self.device, remote_code=self.remote_code).requires_grad_(False)

    @cached_property
    def model(self) -> Any:
        """The unquantised model."""
        return self.load()

    @cached_property
    def scope(self) -> Scope:
        return scope(self.model)

    @cached_property
    def head(self) -> Head:
        return Head(self.model)

    @cached_property
    def reference(self) -> list[torch.Tensor]:
        return self.windows.hidden(self.model)

    @cached_property
    def calibration(self) -> Calibration:
        rows = [torch.as_tensor(np.asarray(ids)).long() for ids in self.calibrate["tokens"]]
        return Calibration(self.model, torch.stack(rows))

    def scores(self, model: Any, head: Head | None = None) -> JSON:
        """Means over the tokens of each window, of a model against the unquantised one."""
        found = self.windows.scores(head or Head(model), self.windows.hidden(model), self.reference, self.head)
        if not np.isfinite(found["nll"]).all():
            raise BitallocError("a scheme makes the model's scores NaN or Inf; leave it out of the section schemes")
        return {name: found[name].tolist() for name in SCORES}

    def models(self, names: list[str]) -> dict[str, Callable[[], Any]]:
        """The unquantised model and every scheme of these names, each made anew when it is called for."""

        def made(scheme: Scheme) -> Any:
            model = self.load()
            apply(model, scheme, calibration=self.calibration if scheme.calibrated else None, seed=self.seed)
            return model

        schemes = parse(self.settings, names)
        return {REFERENCE: self.load} | {scheme.name: partial(made, scheme) for scheme in schemes}

    def identities(self, names: list[str]) -> dict[str, str]:
        """What each of them is made of."""
        keys = {REFERENCE: None} | {scheme.name: scheme.key() for scheme in parse(self.settings, names)}
        return {name: digest([self.identity, key]) for name, key in keys.items()}

    @property
    def protocol(self) -> str:
        drawn = f"95 % percentile bootstrap over windows, {self.draws['resamples']} resamples"
        return f"{self.windows.protocol}; float32 log-softmax; {drawn}"

    def mean(self, values_W: Any, tokens_W: Any, where_W: Any = slice(None)) -> intervals.Interval:
        corpus_W = self.windows.frame["corpus"].to_numpy()[where_W]
        return intervals.mean(np.asarray(values_W)[where_W], np.asarray(tokens_W)[where_W], corpus_W, **self.draws)


def ladder(bench: Bench) -> pd.DataFrame:
    """SCHEMES of the unquantised model and of every scheme of the configuration, one row a corpus.

    A scheme that a backend or this family cannot carry, or whose library is not here, is a row that says so.
    """
    schemes = parse(bench.settings, bench.settings.names)
    print(f"[schemes] scope {bench.scope.digest[:12]}\n{bench.scope}", file=sys.stderr, flush=True)
    progress = Progress("schemes", len(schemes), unit="schemes")
    found = {REFERENCE: _reference(bench)}
    for scheme in schemes:
        key = digest(["schemes", bench.identity, scheme.key()])
        record = bench.store.get(key)
        progress.advance(0 if record is None else 1, cached=True, note=scheme.name)
        if record is None:
            record = _measured(bench, scheme)
            if record["status"] == MEASURED:  # a library may be installed by the next run
                bench.store.put(key, record)
            progress.advance(note=scheme.name)
        found[scheme.name] = record
    rows = _rows(bench, Scheme(REFERENCE, dtype=str(bench.model.dtype).removeprefix("torch.")), found)
    for scheme in schemes:
        rows += _rows(bench, scheme, found)
    return pd.DataFrame(rows)[SCHEMES.names]


def _reference(bench: Bench) -> JSON:
    weights = sum(matrix.rows * matrix.columns for matrix in bench.scope.matrices)
    told = {"nbytes": bench.nbytes, "weights": weights, "rotations": 0, "bits": {}}
    return {"status": MEASURED, **told, **bench.scores(bench.model)}


def _measured(bench: Bench, scheme: Scheme) -> JSON:
    model = bench.load()
    try:
        calibration = bench.calibration if scheme.calibrated else None
        record = apply(model, scheme, calibration=calibration, seed=bench.seed)
    except BitallocError as refusal:
        return {"status": str(refusal)}
    told = {name: getattr(record, name) for name in ("nbytes", "weights", "rotations")}
    return {"status": MEASURED, **told, "bits": dict(record.bits), **bench.scores(model)}


def _rows(bench: Bench, scheme: Scheme, found: Mapping[str, JSON]) -> list[dict[str, Any]]:
    record, before = found[scheme.name], found.get(scheme.against, {"status": ""})
    names = "weights activations rotation allocation".split()
    shared = {
        **scheme.row(),
        **{name: getattr(scheme, name) for name in names},
        "status": record["status"],
        "against": scheme.against if MEASURED == record["status"] == before["status"] else "",
        **{name: record.get(name) for name in ("nbytes", "rotations")},
        "bits_per_weight": 8 * record["nbytes"] / record["weights"] if "nbytes" in record else None,
        "bits": json.dumps(record["bits"]) if "bits" in record else None,
        "seed": bench.seed,
        "scope": bench.scope.json,
        "scope_digest": bench.scope.digest,
        "protocol": bench.protocol,
    }
    task_W = (bench.windows.frame["corpus"] + "/" + bench.windows.frame["split"]).to_numpy()
    return [{**shared, "task": task, **_task(bench, task_W == task, record, before)} for task in dict.fromkeys(task_W)]


def _task(bench: Bench, where_W: np.ndarray, record: JSON, before: JSON) -> dict[str, Any]:
    """Estimates of one corpus; missing where nothing was measured."""
    own: dict[str, intervals.Interval | None] = dict.fromkeys(["nll", "kl", "top1", "kl_change", "nll_change"])
    tokens = 0
    if record["status"] == MEASURED:
        tokens_W = record["tokens"]
        tokens = int(np.asarray(tokens_W)[where_W].sum())
        own |= {name: bench.mean(record[name], tokens_W, where_W) for name in ("nll", "kl", "top1")}
        for name in ("kl", "nll") if before["status"] == MEASURED else ():
            own[f"{name}_change"] = bench.mean(np.subtract(record[name], before[name]), tokens_W, where_W)
    row = ends("ppl", own["nll"], np.exp) | {"n_tokens": tokens, "n_windows": int(where_W.sum())}
    for name, interval in own.items():
        row |= ends(name if name == "top1" else f"{name}_nats_per_token", interval)
    return row


def ends(
    name: str, interval: intervals.Interval | None = None, function: Callable[[float], float] = float
) -> dict[str, float | None]:
    """The three columns of an estimate; missing without one.

    >>> ends("kl_nats_per_token", intervals.Interval(2.0, 1.0, 4.0, 9))
    {'kl_nats_per_token': 2.0, 'kl_lo': 1.0, 'kl_hi': 4.0}
    """
    short = name.removesuffix("_nats_per_token")
    values = (None,) * 3 if interval is None else (interval.value, interval.lo, interval.hi)
    columns = zip((name, f"{short}_lo", f"{short}_hi"), values, strict=True)
    return {column: None if value is None else float(function(value)) for column, value in columns}


def open_bench(inputs: Mapping[str, Path], split: str, settings: config.Config, *, remote_code: bool = False) -> Bench:
    """The bench of a model whose checkpoint.json, INVENTORY and TOKENS lie at these paths."""
    return Bench(
        path=open_checkpoint(inputs["checkpoint"]).path,
        inventory=INVENTORY.read(inputs["inventory"]),
        tokens=TOKENS.read(inputs["tokens"]),
        split=split,
        settings=settings.schemes,
        evaluate=settings.evaluate,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
        seed=settings.seed,
        remote_code=remote_code,
    )
