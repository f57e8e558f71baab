"""Variants: one model at some precision, named in a word, to be loaded in any process.

`reference` is the model as it is. `<plan>:<backend>` is a plan in a member of `backends`: a rule by position (all_low,
champion, ...: INT8 by absmax, which needs no calibration), or a checkpoint of the pipeline, `best-2.6bpw:native`.
Anything else is a scheme of weights and activations, `w4a8+gptq` (bitalloc/scheme.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from bitalloc import models, scan
from bitalloc.backends import BACKENDS, Subject, memory
from bitalloc.compress import compress_maps
from bitalloc.config import Schemes
from bitalloc.errors import BitallocError, nearest
from bitalloc.formats.bitalloc import Reader
from bitalloc.models import Checkpoint, read_config
from bitalloc.option import PASS_THROUGH
from bitalloc.scheme import Scheme
from bitalloc.store import Store, digest
from bitalloc.strategies.position import RULES, position

REFERENCE = "reference"
LIBRARIES = {
    "native": ["bitalloc.formats.packed"],
    "huggingface": ["compressed_tensors", "peft"],
    "torchao": ["torchao.quantization"],
    "torchao_int8": ["torchao.quantization"],
    "bitsandbytes": ["bitsandbytes"],
    "bitsandbytes_int8": ["bitsandbytes"],
}


def parts(variant: str) -> tuple[str, str]:
    """(plan, backend) of a name, both empty for a scheme; raises `BitallocError` for what names no variant.

    >>> parts("reference"), parts("all_low:torchao_int8"), parts("w8a8")
    (('', 'reference'), ('all_low', 'torchao_int8'), ('', ''))
    """
    if variant == REFERENCE:
        return "", REFERENCE
    plan, colon, backend = variant.partition(":")
    if not colon:
        Scheme.parse(variant)
        return "", ""
    if backend not in BACKENDS:
        raise BitallocError(f"variant {variant!r}: unknown backend {backend!r}: {nearest(backend, BACKENDS)}")
    return plan, backend


def calibrated(names: Sequence[str]) -> bool:
    """Whether one of the variants has to read text before its codes are known."""
    return any(parts(name) == ("", "") and Scheme.parse(name).calibrated for name in names)


@dataclass(frozen=True)
class Variant:
    """All that a fresh process needs to have the model: plain values."""

    name: str
    source: Path
    device: str
    threads: int
    remote_code: bool = False
    backend: str = REFERENCE  # empty for a scheme
    folder: Path | None = None  # native checkpoint of the plan
    scratch: Path | None = None
    scheme: Scheme | None = None
    calibration: list[list[int]] | None = None  # tokens [N, T] that a scheme is calibrated on
    seed: int = 0  # of its rotations


@dataclass(frozen=True)
class Loaded:
    """A model, ready to evaluate, and what RECORDS has of its precision."""

    model: Any
    facts: Mapping[str, Any]


@contextmanager
def variants(
    names: Sequence[str],
    *,
    checkpoint: Checkpoint,
    inventory: pd.DataFrame,
    device: str,
    threads: int,
    scratch: Path,
    plans: Mapping[str, Path] | None = None,
    remote_code: bool = False,
    schemes: Schemes | None = None,
    calibration: list[list[int]] | None = None,
    seed: int = 0,
) -> Iterator[list[Variant]]:
    """Variants of a model, in that order; `plans` are checkpoints that are there, those of rules lie in `scratch`."""
    for left in scratch.glob(".variants.*"):  # of a run that was killed; two do not work in one folder
        rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=scratch, prefix=".variants.") as folder:
        made, there = [], dict(plans or {})
        for name in names:
            plan, backend = parts(name)
            if plan and plan not in there:
                there[plan] = _rule(plan, checkpoint, inventory, Path(folder))
            where = Path(folder) / f"scratch-{len(made)}"
            where.mkdir()
            shared, scheme = (checkpoint.path, device, threads, remote_code), None
            if not backend:
                how = schemes or Schemes()
                scheme = Scheme.parse(name, group_size=how.group_size, percentile=how.percentile)
            made.append(Variant(name, *shared, backend, there.get(plan), where, scheme, calibration, seed))
        yield made


def _rule(plan: str, checkpoint: Checkpoint, inventory: pd.DataFrame, folder: Path) -> Path:
    """Native checkpoint of a rule by position."""
    if plan not in RULES:
        raise BitallocError(f"unknown plan {plan!r} of a variant: {nearest(plan, RULES)}")
    rule = position(plan, 1 + int(inventory["block"].max()))
    where = {"results": folder, "store": Store(folder / "store"), "device": torch.device("cpu")}
    return compress_maps({plan: rule}, checkpoint=checkpoint, inventory=inventory, **where)[plan]


def libraries(made: Sequence[Variant]) -> list[str]:
    """Modules that loading the variants imports, and that a process should not count as its own work."""
    kinds = {str(read_config(variant.source).get("model_type")) for variant in made if not variant.remote_code}
    found = [f"transformers.models.{kind}.modeling_{kind}" for kind in sorted(kinds)]
    return found + [module for variant in made for module in LIBRARIES.get(variant.backend, ())]


def prepare(*modules: str) -> None:
    """Import them; what is missing is told when it is needed."""
    for module in ("transformers.models.auto.modeling_auto", *modules):
        with suppress(ImportError):
            importlib.import_module(module)
    from transformers.utils import logging

    logging.set_verbosity_error()  # every process would say again which kernels are not installed


def load(variant: Variant) -> Loaded:
    """The model; raises `BitallocError` where this machine or the backend cannot carry it."""
    torch.set_num_threads(variant.threads)
    device = torch.device(variant.device)
    facts: dict[str, Any] = {"simulated": False, "w_bits": 16.0, "a_bits": 16, "quant_backend": variant.backend}
    if variant.folder is None:
        model = models.load_model(variant.source, device=device, remote_code=variant.remote_code)
        facts |= {"quant_backend": None} if variant.scheme is None else _scheme(variant, variant.scheme, model)
    else:
        assert variant.scratch is not None
        reader = Reader(variant.folder)
        subject = Subject(reader, variant.source, variant.scratch, device, variant.remote_code)
        runnable = BACKENDS[variant.backend](subject)
        if runnable.write:
            runnable.write()
        model = runnable.load()
        facts |= _facts(reader)
        facts["simulated"] = variant.backend == "dequantised"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    facts |= {
        "dtype": dtype,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "scan_path": _scan_path(model, device),
    }
    facts["isa"] = torch.backends.cpu.get_cpu_capability()
    return Loaded(model.eval(), facts | {"nbytes": memory(model)})


def _scheme(variant: Variant, scheme: Scheme, model: Any) -> dict[str, Any]:
    """Put the model into the scheme; what RECORDS has of it."""
    from bitalloc.schemes import apply

    tokens_NT = None if variant.calibration is None else torch.tensor(variant.calibration)
    record = apply(model, scheme, calibration=tokens_NT, seed=variant.seed)
    told = record.row()
    facts = {name: told[name] for name in "a_bits group_size per_channel quant_backend calib_method".split()}
    spread = [(record.bits[unit.name], unit.rows, m) for m in record.scope.matrices for unit in m.units]
    weights = [len(range(m.rows)[rows]) * m.columns for _, rows, m in spread]
    mean = sum(bits * count for (bits, *_), count in zip(spread, weights, strict=True)) / sum(weights)
    # torchao multiplies integers where both sides have 8 bits; all else is rounded and computed as floats
    simulated = (record.scheme.quant_backend, record.scheme.w_bits, record.scheme.a_bits) != ("torchao", 8, 8)
    return facts | {"w_bits": float(mean), "scope_digest": told["scope_digest"], "simulated": simulated}


def _scan_path(model: Any, device: torch.device) -> str | None:
    """How a state-space model scans its prompt; None for others."""
    return scan.scan_path(device) if model.config.model_type == "mamba2" else None


def _facts(reader: Reader) -> dict[str, Any]:
    """What RECORDS has of a plan."""
    rows = pd.DataFrame(list(reader.plan.values()), index=list(reader.plan))
    coded = rows[rows["quantizer"] != PASS_THROUGH]
    weights = rows["rows"] * rows["columns"]
    groups, how = set(coded["group_size"]), set(coded["quantizer"])
    return {
        "w_bits": float((rows["bits"] * weights).sum() / weights.sum()),
        "group_size": int(groups.pop()) if len(groups) == 1 else None,
        "per_channel": bool((coded["group_size"] >= coded["columns"]).all()) if len(coded) else None,
        "calib_method": how.pop() if len(how) == 1 else None,
        "scope_digest": digest(sorted(coded.index)) if len(coded) else None,
    }
