"""State drift: how far the recurrent state of a Mamba2 strays when its projections are quantised -> DRIFT.

The state itself stays in float32 and is not quantised: what is measured is what rounding in_proj and out_proj, and what
they are multiplied with, does to the state that is built from their outputs. Both models read identical tokens (teacher
forcing) in the same pieces; at t = 1, 2, 4 .. times `first` tokens, per layer and head,

    state_relerr     ||S_q - S_ref|| / ||S_ref||, S the state [P, N] behind token t
    readout_relerr   ||y_q - y_ref|| / ||y_ref||, y [P] what the scan reads from it at token t: C_t S_t + D x_t

and over the tokens since the t before, kl_nats_per_token (KL of the next token, reference || quantised) and top1, the
share of tokens with the same argmax. `slope` is that of ln state_relerr over ln t, least squares: 0 says that errors
are forgotten as fast as they come, 1/2 that they add up like noise, 1 that they add up. Intervals are over sequences.
The half-life of a head, ln 2 / mean(-dt A) tokens, is how long it remembers; `rho` is Spearman's over all heads,
half-life against state_relerr at the last t.

Floors, the reference against itself: `floor: step` decodes token by token what was read in chunks, `floor: bf16 state`
also rounds the state to bfloat16 behind every token.

Free running: from a prompt each model goes on greedily by itself. first_divergence_tokens is the first token, counted
from 1, that differs from the reference's (`new_tokens` + 1 if none does), repetition_rate the share of 4-grams that
were there before, nonfinite the logits that are NaN or infinite.

Legend: N sequences, T tokens, K times t, L layers, H heads of P channels with N_s entries of state each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import softplus

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.progress import Progress
from bitalloc.reader import Reader, greedy
from bitalloc.scan import scan_path_of
from bitalloc.statistics import mean_interval, resample, spearman
from bitalloc.store import Store, digest
from bitalloc.tables import DRIFT

REFERENCE = "reference"
STEP, BF16 = "floor: step", "floor: bf16 state"
PIECE = 256  # tokens that are read at once, so that no more logits are in memory
NGRAM = 4
INF = float("inf")
WHOLE = -1  # t, layer and head of rows that are about all of them


def times(settings: config.Drift) -> list[int]:
    """first, 2 first, 4 first .. and the length.

    >>> times(config.Drift(first=8, length=100))
    [8, 16, 32, 64, 100]
    """
    count = max(0, math.ceil(math.log2(settings.length / settings.first)))
    return [settings.first * 2**k for k in range(count)] + [settings.length]


def sequences(tokens: pd.DataFrame, settings: config.Drift) -> torch.Tensor:
    """ids_NT: the report windows of each corpus one behind the other, cut to `length`; corpora in turns."""
    report = tokens[tokens["split"] == "report"]
    cut = []
    for _, part in report.groupby("corpus", sort=False):
        ids = np.concatenate([np.asarray(window) for window in part["tokens"]])
        whole = len(ids) // settings.length
        cut.append(ids[: whole * settings.length].reshape(whole, settings.length))
    rows = [own[place] for place in range(max(map(len, cut))) for own in cut if place < len(own)]
    if len(rows) < 2:
        raise BitallocError(
            f"drift reads {settings.length} tokens, the report windows hold fewer than two such sequences; "
            "lower drift.length or raise retrieve.report_windows"
        )
    return torch.from_numpy(np.stack(rows[: settings.sequences])).long()


# ---- what is measured --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Strayed:
    """Of each sequence: errors by time, layer and head, and predictions by time."""

    state_NKLH: np.ndarray
    readout_NKLH: np.ndarray
    kl_NK: np.ndarray
    top1_NK: np.ndarray

    @classmethod
    def join(cls, parts: list[Strayed]) -> Strayed:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@contextmanager
def _read_out(model: Any) -> Iterator[list[torch.Tensor]]:
    """y_BHP of every layer at the last token of what was read last: the input of the gated norm."""
    mixers = [block.mixer for block in model.backbone.layers]
    found: list[torch.Tensor] = [torch.empty(0)] * len(mixers)

    def hook(layer: int, mixer: Any, y_BTD: torch.Tensor) -> None:
        found[layer] = y_BTD[:, -1].detach().float().unflatten(-1, (mixer.num_heads, -1))

    handles = [
        mixer.norm.register_forward_pre_hook(lambda _, args, layer=layer, mixer=mixer: hook(layer, mixer, args[0]))
        for layer, mixer in enumerate(mixers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def strayed(reference: Any, other: Any, ids_NT: torch.Tensor, at: list[int], *, batch: int, by: str = "") -> Strayed:
    """How far `other` strays from `reference` on the same tokens. `by`: STEP or BF16, other reads token by token."""
    return Strayed.join([_strayed(reference, other, ids_BT, at, by) for ids_BT in ids_NT.split(batch)])


def _strayed(reference: Any, other: Any, ids_BT: torch.Tensor, at: list[int], by: str) -> Strayed:
    edges = sorted({0, *at, *range(0, ids_BT.shape[1], PIECE)})
    readers = Reader(reference), Reader(other)
    states, readouts, kl, top1 = [], [], [[]], [[]]
    with _read_out(reference) as y_ref, _read_out(other) as y:
        for start, stop in pairwise(edges):
            piece_BT = ids_BT[:, start:stop]
            p_BTV = readers[0].read(piece_BT).float().log_softmax(-1)
            expected = [*y_ref]  # of a floor both are one model, and the next read fills both lists
            q_BTV = (_steps(readers[1], piece_BT, by) if by else readers[1].read(piece_BT)).float().log_softmax(-1)
            kl[-1].append((p_BTV.exp() * (p_BTV - q_BTV)).sum(-1).clamp_min(0))  # rounding may leave it below
            top1[-1].append((p_BTV.argmax(-1) == q_BTV.argmax(-1)).float())
            if stop in at:
                pairs = zip(*(reader.states for reader in readers), strict=True)
                states.append(torch.stack([_apart(a.flatten(2), b.flatten(2)) for a, b in pairs], 1))
                readouts.append(torch.stack([_apart(a, b) for a, b in zip(expected, y, strict=True)], 1))
                kl.append([])
                top1.append([])
    means = (torch.stack([torch.cat(part, 1).mean(1) for part in whole if part], 1) for whole in (kl, top1))
    return Strayed(
        *(part.double().cpu().numpy() for part in (torch.stack(states, 1), torch.stack(readouts, 1), *means))
    )


def _apart(expected_BHX: torch.Tensor, found_BHX: torch.Tensor) -> torch.Tensor:
    """||found - expected|| / ||expected|| over the last axis; 0 where both are 0."""
    off, size = ((found_BHX - expected_BHX).norm(dim=-1), expected_BHX.norm(dim=-1))
    return torch.where(off == 0, 0.0, off / size)


def _steps(reader: Reader, ids_BT: torch.Tensor, by: str) -> torch.Tensor:
    logits = []
    for t in range(ids_BT.shape[1]):
        logits.append(reader.read(ids_BT[:, t : t + 1]))
        for state in reader.states if by == BF16 else ():
            state.copy_(state.bfloat16())
    return torch.cat(logits, 1)


@torch.inference_mode()
def half_lives(model: Any, ids_NT: torch.Tensor, *, batch: int) -> np.ndarray:
    """ln 2 / mean(-dt A) in tokens, [L, H]: the time in which a head forgets half, decaying at its mean rate."""
    mixers = [block.mixer for block in model.backbone.layers]
    total_LH = torch.zeros(len(mixers), mixers[0].num_heads, dtype=torch.float64, device=ids_NT.device)

    def hook(layer: int, mixer: Any, projected_BTO: torch.Tensor) -> None:
        dt_BTH = softplus(projected_BTO[..., -mixer.num_heads :] + mixer.dt_bias).clamp(*mixer.time_step_limit)
        total_LH[layer] += dt_BTH.double().sum((0, 1))

    handles = [
        mixer.in_proj.register_forward_hook(lambda _, __, out, layer=layer, mixer=mixer: hook(layer, mixer, out))
        for layer, mixer in enumerate(mixers)
    ]
    try:
        for ids_BT in ids_NT.split(batch):
            reader = Reader(model)
            for piece_BT in ids_BT.split(PIECE, 1):
                reader.read(piece_BT, last=1)
    finally:
        for handle in handles:
            handle.remove()
    rate_LH = total_LH / ids_NT.numel() * torch.stack([mixer.A_log.double().exp() for mixer in mixers])
    return (math.log(2) / rate_LH).cpu().numpy()


@torch.inference_mode()
def running(model: Any, ids_NT: torch.Tensor, settings: config.Drift) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, new_tokens] that the model goes on with from the first `prompt` ones, and its broken logits [N]."""
    found = []
    for ids_BT in ids_NT[:, : settings.prompt].split(settings.batch):
        reader = Reader(model)
        found.append(greedy(reader, reader.read(ids_BT, last=1)[:, -1], settings.new_tokens))
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))


def first_divergence(expected_NT: np.ndarray, found_NT: np.ndarray) -> np.ndarray:
    """Place of the first token that differs, from 1; T + 1 where none does.

    >>> first_divergence(np.array([[5, 6, 7], [5, 6, 7]]), np.array([[5, 9, 7], [5, 6, 7]])).tolist()
    [2, 4]
    """
    off_NT = np.concatenate([expected_NT != found_NT, np.ones((len(found_NT), 1), dtype=bool)], axis=1)
    return off_NT.argmax(1) + 1


def repetition(tokens_NT: np.ndarray) -> np.ndarray:
    """Share of 4-grams of a sequence that occurred in it before.

    >>> repetition(np.array([[1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1]])).tolist()
    [0.0, 0.75]
    """
    count = tokens_NT.shape[1] - NGRAM + 1
    grams = [{tuple(row[start : start + NGRAM]) for start in range(count)} for row in tokens_NT.tolist()]
    return np.array([1 - len(own) / max(1, count) for own in grams])


# ---- the table ---------------------------------------------------------------------------------------
def drift(
    models: Mapping[str, Callable[[], Any]],
    ids_NT: torch.Tensor,
    settings: config.Drift,
    *,
    resamples: int,
    seed: int,
    store: Store,
    identities: Mapping[str, str],
    device: torch.device,
) -> pd.DataFrame:
    """DRIFT of every model but the first, `reference`, of the two floors, and of what runs freely.

    `models` makes each when it is needed. What was measured of one is a shard of the store under its identity, which
    says what the model is made of; the text and the settings are put to it here.
    """
    ids_NT, at = ids_NT.to(device), times(settings)
    names = [*(name for name in models if name != REFERENCE), STEP, BF16]
    progress = Progress("drift", 1 + len(names), unit="models")

    def shard(name: str, measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        identity = identities.get(name, [identities[REFERENCE], name])
        key = digest(["drift", identity, identities[REFERENCE], ids_NT.tolist(), settings.model_dump()])
        record = store.get(key)
        progress.advance(0 if record is None else 1, cached=True)
        if record is None:
            record = {what: np.asarray(values).tolist() for what, values in measure().items()}
            store.put(key, record)
            progress.advance(note=name)
        return {what: np.array(values) for what, values in record.items()}

    @cache
    def reference() -> Any:
        model = models[REFERENCE]()
        if (kind := model.config.model_type) != "mamba2":
            raise BitallocError(
                f"drift is that of the state of a Mamba2, and a {kind} has none; ask for passkey.parquet"
            )
        return model

    def of_reference() -> dict[str, np.ndarray]:
        tokens_NT, broken_N = running(reference(), ids_NT, settings)
        half_LH = half_lives(reference(), ids_NT, batch=settings.batch)
        path = scan_path_of(reference(), device)
        return {"half_life": half_LH, "tokens": tokens_NT, "broken": broken_N, "scan_path": path}

    def of_other(name: str) -> dict[str, np.ndarray]:
        floor = name in (STEP, BF16)
        other = reference() if floor else models[name]()
        found = vars(strayed(reference(), other, ids_NT, at, batch=settings.batch, by=name if floor else ""))
        if not floor:
            tokens_NT, broken_N = running(other, ids_NT, settings)
            found = found | {"tokens": tokens_NT, "broken": broken_N}
        return found

    base = shard(REFERENCE, of_reference)
    rng = np.random.default_rng(seed)
    counts_RN = resample(np.zeros(len(ids_NT)), resamples, rng)
    rows = _running(REFERENCE, base, base, counts_RN)
    rows += [
        _row(REFERENCE, "half_life_tokens", value=value, layer=layer, head=head)
        for (layer, head), value in np.ndenumerate(base["half_life"])
    ]
    for name in names:
        found = shard(name, lambda name=name: of_other(name))
        rows += _strayed_rows(name, found, at, base["half_life"], counts_RN)
        if "tokens" in found:
            rows += _running(name, base, found, counts_RN)
    shared = {"scan_path": base["scan_path"].item(), "state_dtype": "float32", "seed": seed}
    frame = pd.DataFrame(rows).assign(**shared)
    frame.loc[frame["scheme"] == BF16, "state_dtype"] = "bfloat16"
    return frame[DRIFT.names]


def _row(
    scheme: str, metric: str, *, value: float, t: int = WHOLE, layer: int = WHOLE, head: int = WHOLE, **ends: Any
) -> dict[str, Any]:
    place = {"t": t, "layer": layer, "head": head}
    return {"scheme": scheme, "metric": metric, **place, "value": value, "lo": None, "hi": None, "n": 1} | ends


def _mean(values_N: np.ndarray, counts_RN: np.ndarray, within: tuple[float, float] = (-INF, INF)) -> dict[str, Any]:
    """Mean over sequences with its interval, cut to what can be; no value where one of them has none."""
    if not np.isfinite(values_N).all():
        return {"value": None, "n": len(values_N)}
    n = len(values_N)
    told = mean_interval(values_N.mean(), counts_RN @ values_N / n, n)
    return {"value": told.value, "lo": max(told.lo, within[0]), "hi": min(told.hi, within[1]), "n": n}


def _strayed_rows(
    name: str, found: Mapping[str, np.ndarray], at: list[int], half_LH: np.ndarray, counts_RN: np.ndarray
) -> list[dict[str, Any]]:
    rows = []
    for k, t in enumerate(at):
        for metric, key, most in (("kl_nats_per_token", "kl_NK", INF), ("top1", "top1_NK", 1.0)):
            rows.append(_row(name, metric, t=t, **_mean(found[key][:, k], counts_RN, (0.0, most))))
        for metric, key in (("state_relerr", "state_NKLH"), ("readout_relerr", "readout_NKLH")):
            whole = found[key][:, k]
            rows.append(_row(name, metric, t=t, **_mean(whole.mean((1, 2)), counts_RN, (0.0, INF))))
            rows += [
                _row(name, metric, t=t, layer=layer, head=head, **_mean(whole[:, layer, head], counts_RN, (0.0, INF)))
                for layer, head in np.ndindex(half_LH.shape)
            ]
    slope_NLH = slopes(found["state_NKLH"], at)
    rows.append(_row(name, "slope", **_mean(slope_NLH.mean((1, 2)), counts_RN)))
    rows += [
        _row(name, "slope", layer=layer, head=head, **_mean(slope_NLH[:, layer, head], counts_RN))
        for layer, head in np.ndindex(half_LH.shape)
    ]
    last_NX = found["state_NKLH"][:, -1].reshape(len(slope_NLH), -1)
    return [*rows, _row(name, "rho", **_rho(half_LH.ravel(), last_NX, counts_RN))]


def slopes(state_NKLH: np.ndarray, at: list[int]) -> np.ndarray:
    """Least-squares slope of ln error over ln t, [N, L, H]; not a number where an error is 0.

    >>> t = np.array([8, 16, 64])
    >>> slopes(0.01 * t[None, :, None, None] ** 0.5, t.tolist()).round(6).item()
    0.5
    """
    x_K = np.log(at) - np.log(at).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.einsum("k,nklh->nlh", x_K / (x_K @ x_K), np.log(state_NKLH))
    return np.where(np.isfinite(found), found, np.nan)


def _rho(half_X: np.ndarray, error_NX: np.ndarray, counts_RN: np.ndarray) -> dict[str, Any]:
    """Spearman over heads of half-life against error, with percentiles over resampled sequences."""
    if not error_NX.any():
        return {"value": None, "n": len(half_X)}
    drawn_RX = np.concatenate([error_NX.mean(0)[None], counts_RN @ error_NX / len(error_NX)])
    value, *drawn = spearman(np.broadcast_to(half_X, drawn_RX.shape), drawn_RX)
    lo, hi = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "lo": lo, "hi": hi, "n": len(half_X)}


def _running(
    name: str, base: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], counts_RN: np.ndarray
) -> list[dict[str, Any]]:
    rows = [
        _row(name, "repetition_rate", **_mean(repetition(found["tokens"]), counts_RN, (0.0, 1.0))),
        _row(name, "nonfinite", value=float(found["broken"].sum()), n=len(found["broken"])),
    ]
    if name != REFERENCE:
        divergence_N = first_divergence(base["tokens"], found["tokens"]).astype(float)
        ends = (1.0, found["tokens"].shape[1] + 1.0)
        rows.append(_row(name, "first_divergence_tokens", **_mean(divergence_N, counts_RN, ends)))
    return rows
