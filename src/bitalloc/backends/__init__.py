"""Backends: does what was simulated survive the software that runs it? One plan, many ways to run it -> BACKENDS.

A member is a function of one file and a line of the registry: it refuses a plan that it cannot carry, and a machine
that lacks its library, before anything is loaded. All are scored by the suites and on the windows of the evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from bitalloc import config
from bitalloc.backends.backend import Runnable, Subject
from bitalloc.backends.bitsandbytes import bitsandbytes, bitsandbytes_int8
from bitalloc.backends.gguf import gguf
from bitalloc.backends.gptq import gptq
from bitalloc.backends.huggingface import huggingface
from bitalloc.backends.simulated import dequantised, native, reference
from bitalloc.backends.torchao import torchao, torchao_int8
from bitalloc.errors import BitallocError, nearest
from bitalloc.suites import SUITES, Head, Scored, Windows, intervals
from bitalloc.suites.scoring import CHUNK, hidden
from bitalloc.tables import BACKENDS as TABLE

BACKENDS: dict[str, Callable[[Subject], Runnable]] = {
    "reference": reference,
    "dequantised": dequantised,
    "native": native,
    "huggingface": huggingface,
    "gptq": gptq,
    "gguf": gguf,
    "torchao": torchao,
    "torchao_int8": torchao_int8,
    "bitsandbytes": bitsandbytes,
    "bitsandbytes_int8": bitsandbytes_int8,
}
MEASURED, LOSS = "measured", "loss_nats_per_token"
METRICS = {"nll_nats_per_token": "perplexity", "kl_nats_per_token": "divergence", "top1": "divergence"}


def measure(
    name: str,
    *,
    plan: str,
    subject: Subject,
    tokens: pd.DataFrame,
    settings: config.Evaluate,
    seed: int = 0,
    speed: bool = False,
) -> pd.DataFrame:
    """Rows of BACKENDS, one a report corpus: what the backend `name` makes of the plan, or why it does not run.

    `speed`: time it in turns with the unquantised model, which then are in memory at once, for `speedup`.
    Raises `BitallocError` for a name that is unknown and for scores that cannot be had.
    """
    if name not in BACKENDS:
        raise BitallocError(f"unknown backend {name!r} in backends.names: {nearest(name, BACKENDS)}")
    report = tokens[tokens["split"] == "report"]
    windows = Windows(report, batch=settings.batch, device=subject.device, stride=settings.stride)
    tasks = list(dict.fromkeys(report["corpus"] + "/" + report["split"]))
    try:
        runnable = BACKENDS[name](subject)
    except BitallocError as refusal:
        return _frame([{"plan": plan, "backend": name, "task": task, "status": str(refusal)} for task in tasks])

    unquantised = reference(subject).load()
    head = Head(unquantised)
    expected = _hidden(windows, unquantised)
    del unquantised
    dense = dequantised(subject).load()
    simulated, simulated_head = _hidden(windows, dense), Head(dense)
    del dense

    nbytes = runnable.write() if runnable.write else None
    start = time.perf_counter()
    model = runnable.load()
    load_s = time.perf_counter() - start
    own_head = Head(model)  # its probe is the first forward pass, in which some libraries unpack
    start = time.perf_counter()
    own = _hidden(windows, model)
    rate = sum(batch.tokens_BT.numel() for batch in windows.batches) / (time.perf_counter() - start)

    shared = {
        "plan": plan,
        "backend": name,
        "status": MEASURED,
        "max_logit_difference": logit_difference(own_head, own, simulated_head, simulated),
        "nbytes": memory(model) if nbytes is None else nbytes,
        "held": "memory" if nbytes is None else "disk",
        "load_s": load_s,
        "tokens_per_s": runnable.speed(windows) if runnable.speed else rate,
    }
    if speed:
        shared |= _speedup(windows, reference(subject).load(), model, resamples=settings.resamples, seed=seed)
    given = (windows, pd.DataFrame(), windows.parted(expected))
    scored = Scored(model, own_head, *given, windows.parted(own), reference_head=head)
    beside = Scored(None, simulated_head, *given, windows.parted(simulated), reference_head=head)
    found = _scores(scored, beside, resamples=settings.resamples, seed=seed)
    return _frame([shared | row for row in found])


@torch.inference_mode()
def _speedup(windows: Windows, before: Any, model: Any, *, resamples: int, seed: int) -> dict[str, float]:
    """exp of the mean of ln(t / t'), over batches read in turns by the unquantised model (t) and this one (t')."""
    ratio = []
    for batch in windows.batches:
        wall_s = []
        for each in (before, model, before, model):
            start = time.perf_counter()
            hidden(each, batch).cpu()
            wall_s.append(time.perf_counter() - start)
        ratio.append(math.log(min(wall_s[::2]) / min(wall_s[1::2])))
    at = intervals.mean(ratio, [1] * len(ratio), [0] * len(ratio), resamples=resamples, seed=seed)
    return {"speedup": math.exp(at.value), "speedup_lo": math.exp(at.lo), "speedup_hi": math.exp(at.hi)}


def _hidden(windows: Windows, model: Any) -> list[torch.Tensor]:
    """Final hidden states of all windows, off the device, which is thereby waited for."""
    return [h_ND.cpu() for h_ND in windows.hidden(model)]


def _scores(scored: Scored, beside: Scored, *, resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """For each corpus ppl = exp(mean nll), KL, top-1 agreement and what is lost against `beside`, with intervals."""
    rows = pd.concat([SUITES[suite](scored)[0] for suite in dict.fromkeys(METRICS.values())])
    nll = "nll_nats_per_token"
    own, simulated = (frame[frame["metric"] == nll] for frame in (rows, SUITES["perplexity"](beside)[0]))
    lost = own["value"].to_numpy() - simulated["value"].to_numpy()
    rows = pd.concat([rows, own.assign(metric=LOSS, value=lost)])
    if not np.isfinite(rows["value"]).all():
        raise BitallocError("the scores are NaN or Inf; leave this backend out of backends.names")
    for task, part in rows[rows["metric"].isin([*METRICS, LOSS])].groupby("task", sort=False):
        found: dict[str, Any] = {"task": task}
        for metric, of in part.groupby("metric"):
            at = intervals.mean(of["value"], of["weight"], of["group"], resamples=resamples, seed=seed)
            column, values = str(metric), np.array([at.value, at.lo, at.hi])
            if column == "nll_nats_per_token":
                column, values = "ppl", np.exp(values)
            short = column.removesuffix("_nats_per_token")
            found |= zip((column, f"{short}_lo", f"{short}_hi"), values.tolist(), strict=True)
        yield found


def _frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=TABLE.names).astype({"nbytes": "Int64", "tokens_per_s": "Float64"})


@torch.inference_mode()
def logit_difference(
    head: Head, own: Sequence[torch.Tensor], simulated_head: Head, simulated: Sequence[torch.Tensor]
) -> float:
    """max |z' - z| / max |z| over tokens and vocabulary; z are the logits of the dequantised plan, z' the backend's.

    >>> from types import SimpleNamespace
    >>> head = SimpleNamespace(weight_VD=torch.eye(2), logits=lambda h_ND: 2 * h_ND)
    >>> logit_difference(head, [torch.tensor([[1.0, -4.0]])], head, [torch.tensor([[2.0, -4.0]])])
    0.25
    """
    largest, scale = 0.0, 0.0
    device, size = head.weight_VD.device, max(1, CHUNK // len(head.weight_VD))
    for own_ND, simulated_ND in zip(own, simulated, strict=True):
        for ours, theirs in zip(own_ND.split(size), simulated_ND.split(size), strict=True):
            z_NV = simulated_head.logits(theirs.to(device))
            largest = max(largest, float((head.logits(ours.to(device)) - z_NV).abs().max()))
            scale = max(scale, float(z_NV.abs().max()))
    return largest / scale


def memory(model: torch.nn.Module) -> int:
    """Bytes of all that the model keeps, each tensor once, those inside the tensors of a library counted.

    >>> layer = torch.nn.Linear(4, 2)
    >>> memory(torch.nn.Sequential(layer, layer))  # 8 weights, 2 biases
    40
    """
    parts: dict[int, torch.Tensor] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        for part in [getattr(tensor, name) for name in names] or [tensor]:
            parts[id(part)] = part
    return sum(part.nbytes for part in parts.values())


__all__ = ["BACKENDS", "MEASURED", "Runnable", "Subject", "logit_difference", "measure", "memory"]
