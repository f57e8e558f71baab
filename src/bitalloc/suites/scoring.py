"""Scores of next tokens from final hidden states: what every suite measures with.

A forward pass of the model without its head is the expensive part, so it is made once and serves all suites
that read the same tokens. The reference's log-probabilities can be had again, exactly, from its head and its cached
hidden states: no tensor of [tokens, vocabulary] is ever kept.

Legend: B sequences of a batch, T tokens of a sequence, D hidden width, V vocabulary, N scored positions.
"""

from __future__ import annotations

import base64
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812

from bitalloc.errors import BitallocError
from bitalloc.progress import Progress
from bitalloc.store import JSON, Ledger, Store, digest

CHUNK = 2**23  # entries of [N, V] that are in memory at once


@dataclass
class Reading:
    """A token sequence and where it is scored: the hidden state at `positions` predicts `targets`.

    `owners` says which window or choice each scored token counts for.
    """

    tokens: list[int]
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Readings padded on the right, which a causal model never looks at from a scored position."""

    tokens_BT: torch.Tensor
    flat_N: torch.Tensor  # scored positions, as indices into [B T]
    target_N: torch.Tensor
    owner_N: torch.Tensor

    def parted(self, x_N: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """(owner, what belongs to its tokens), where each owner has one reading of its own."""
        owners, counts = torch.unique_consecutive(self.owner_N.cpu(), return_counts=True)
        return list(zip(owners.tolist(), x_N.split(counts.tolist()), strict=True))


def batches(readings: list[Reading], *, tokens: int, device: torch.device) -> list[Batch]:
    """Batches of at most `tokens` padded tokens (one reading at least), of similar lengths."""
    groups: list[list[Reading]] = []
    for reading in sorted(readings, key=lambda reading: len(reading.tokens)):
        if groups and len(reading.tokens) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(reading)
        else:
            groups.append([reading])
    return [_batch(group, device) for group in groups]


def _batch(group: list[Reading], device: torch.device) -> Batch:
    longest = len(group[-1].tokens)
    tokens_BT = np.zeros((len(group), longest), dtype=np.int64)
    for row, reading in zip(tokens_BT, group, strict=True):
        row[: len(reading.tokens)] = reading.tokens
    flat = [row * longest + position for row, reading in enumerate(group) for position in reading.positions]
    return Batch(
        torch.from_numpy(tokens_BT).to(device),
        torch.tensor(flat, device=device),
        torch.tensor([target for reading in group for target in reading.targets], device=device),
        torch.tensor([owner for reading in group for owner in reading.owners], device=device),
    )


def hidden(model: Any, batch: Batch) -> torch.Tensor:
    """h_ND, float32: what the head would read at the scored positions."""
    h_BTD = model.base_model(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
    return h_BTD.flatten(0, 1)[batch.flat_N].float()


class Head:
    """The map from hidden states to log-probabilities, in float32, taken from a `transformers` causal model.

    Raises `BitallocError` when the model does more between its hidden states and its logits than a linear
    map: then cached hidden states would not do.
    """

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self.refresh()
        probe = torch.arange(min(8, len(self.weight_VD)), device=self.weight_VD.device)[None]
        with torch.inference_mode():
            h_ND = model.base_model(input_ids=probe, use_cache=False).last_hidden_state[0].float()
            logits = model(input_ids=probe, use_cache=False).logits[0]
        tolerance, expected = 1e-4 if logits.dtype == torch.float32 else 0.05, logits.float()
        if not torch.allclose(self.logits(h_ND), expected, rtol=tolerance, atol=tolerance * expected.std().item()):
            raise BitallocError(
                f"{type(model).__name__} does more than a linear map after its last hidden state; "
                "its logits cannot be scored yet: teach bitalloc/suites/scoring.py"
            )

    def refresh(self) -> None:
        """Take the weights that the model has now; a packed head knows how to unpack them."""
        bias = getattr(self.module, "bias", None)
        packed = hasattr(self.module, "dequantize")
        self.weight_VD = self.module.dequantize() if packed else self.module.weight.detach().float()
        self.bias_V = None if bias is None else bias.detach().float()

    def fixed(self) -> Head:
        """The head as it is now, whatever becomes of the model's."""
        kept = copy.copy(self)
        kept.weight_VD = self.weight_VD.clone()
        return kept

    def logits(self, h_ND: torch.Tensor) -> torch.Tensor:
        return F.linear(h_ND, self.weight_VD, self.bias_V)


def compare(
    head: Head, batch: Batch, h_ND: torch.Tensor, reference_ND: torch.Tensor | None, reference_head: Head | None = None
) -> dict[str, torch.Tensor]:
    """Scores of every position: `nll` (nats), `greedy` (the target is the argmax), `kl` (nats), `top1` and
    `nll_reference` (nats).

    nll = -log q(target). kl = sum_v p(v) (log p(v) - log q(v)), the reference's p over the full vocabulary;
    top1 = both have the same argmax; nll_reference = -log p(target). The last three need the reference's hidden
    states, and its head where that differs.
    """
    found: dict[str, list[torch.Tensor]] = {}
    size, device = max(1, CHUNK // len(head.weight_VD)), head.weight_VD.device
    for start in range(0, len(h_ND), size):
        span = slice(start, start + size)
        log_q = head.logits(h_ND[span].to(device)).log_softmax(-1)
        best = log_q.argmax(-1)
        scores = {
            "nll": -log_q.gather(-1, batch.target_N[span, None])[:, 0],
            "greedy": (best == batch.target_N[span]).float(),
        }
        if reference_ND is not None:
            log_p = (reference_head or head).logits(reference_ND[span].to(device)).log_softmax(-1)
            scores["top1"] = (best == log_p.argmax(-1)).float()
            scores["nll_reference"] = -log_p.gather(-1, batch.target_N[span, None])[:, 0]
            scores["kl"] = (log_p.exp() * log_q.neg_().add_(log_p)).sum(-1)
        for name, score_N in scores.items():
            found.setdefault(name, []).append(score_N)
    return {name: torch.cat(parts) for name, parts in found.items()}


class Windows:
    """The token windows of one split, ready to be read.

    Every token but the first of a window is scored; with a stride only the last `stride` tokens are, as when a
    window slides over the text by `stride` tokens and scores what is new, each with the context before it. A column
    `scored` says for each window how many of its last tokens are.
    """

    def __init__(self, frame: pd.DataFrame, *, batch: int, device: torch.device, stride: int | None = None) -> None:
        """`frame`: the rows of TOKENS of one split. `batch`: windows a forward pass."""
        if frame.empty:
            raise BitallocError(
                "no token windows of this split: set retrieve.select_windows and report_windows above 0"
            )
        self.frame = frame.reset_index(drop=True)
        self.longest = max(map(len, frame["tokens"]))
        self.stride = min(stride or self.longest, self.longest)
        scored = frame["scored"] if "scored" in frame else [self.stride] * len(frame)
        self.readings = [
            _last(np.asarray(tokens).tolist(), count, owner)
            for owner, (tokens, count) in enumerate(zip(frame["tokens"], scored, strict=True))
        ]
        self.device, self.budget = device, batch * self.longest  # tokens a forward pass
        self.batches = self.some(range(len(self.readings)))

    def some(self, places: Iterable[int]) -> list[Batch]:
        """Batches of these windows."""
        return batches([self.readings[place] for place in places], tokens=self.budget, device=self.device)

    @cached_property
    def keys(self) -> list[str]:
        """What each window is, by content: its tokens, and how many of them are scored."""
        return [
            hashlib.sha256(np.array([len(each.targets), *each.tokens, each.targets[-1]]).tobytes()).hexdigest()
            for each in self.readings
        ]

    @property
    def whole(self) -> bool:
        """All tokens but the first are scored."""
        return self.stride == self.longest

    @property
    def protocol(self) -> str:
        scored = "non-overlapping; first token unscored" if self.whole else f"last {self.stride} tokens scored"
        split = ",".join(self.frame["split"].unique())
        return f"split={split}; window={self.longest}; stride={self.stride}; {scored}"

    @torch.inference_mode()
    def hidden(self, model: Any) -> list[torch.Tensor]:
        """h_ND of every batch."""
        return [hidden(model, batch) for batch in self.batches]

    def parted(self, hidden: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Window -> h_ND, from those of all batches."""
        return dict(pair for batch, h_ND in zip(self.batches, hidden, strict=True) for pair in batch.parted(h_ND))

    def scores(
        self,
        head: Head,
        hidden: Iterable[torch.Tensor],
        reference: Sequence[torch.Tensor] | None = None,
        reference_head: Head | None = None,
    ) -> pd.DataFrame:
        """Mean `nll`, and `kl` and `top1` where a reference is given, with `tokens` scored, one row a window."""
        return self.means(self.tokens(head, hidden, reference, reference_head))

    @torch.inference_mode()
    def tokens(
        self,
        head: Head,
        hidden: Iterable[torch.Tensor],
        reference: Sequence[torch.Tensor] | None = None,
        reference_head: Head | None = None,
    ) -> pd.DataFrame:
        """What `compare` says of every scored token, in float32, and the `window` that it lies in."""
        found: dict[str, list[np.ndarray]] = {}
        for place, (batch, h_ND) in enumerate(zip(self.batches, hidden, strict=True)):
            before_ND = None if reference is None else reference[place]
            scores = compare(head, batch, h_ND, before_ND, reference_head)
            for name, score_N in {**scores, "window": batch.owner_N}.items():
                found.setdefault(name, []).append(score_N.cpu().numpy())
        return pd.DataFrame({name: np.concatenate(parts) for name, parts in found.items()})

    def means(self, tokens: pd.DataFrame) -> pd.DataFrame:
        """Means over each window's tokens, summed in float64, and their number `tokens`; one row a window."""
        window_N, windows = tokens["window"].to_numpy(), len(self.frame)
        count = np.bincount(window_N, minlength=windows)
        scores = tokens.drop(columns="window").astype("float64")
        sums = {name: np.bincount(window_N, scores[name], minlength=windows) for name in scores}
        return pd.DataFrame({name: values / count for name, values in sums.items()} | {"tokens": count.astype(float)})

    def responses(self, suite: str, metric: str, value: pd.Series, weight: pd.Series) -> pd.DataFrame:
        """Rows of RESPONSES without `plan`, one a window; the task is <corpus>/<split>."""
        task = self.frame["corpus"] + "/" + self.frame["split"]
        item = self.frame["window"].astype("int64")
        columns = {"suite": suite, "task": task, "metric": metric, "item": item, "group": self.frame["corpus"]}
        return pd.DataFrame({**columns, "value": value, "weight": weight.astype("float64")})


def spread(tokens: pd.DataFrame, count: int, split: str = "calibrate") -> pd.DataFrame:
    """`count` windows of a split, evenly over it: what sensitivities are measured on."""
    whole = tokens[tokens["split"] == split]
    if whole.empty:
        raise BitallocError(f"no windows of the split {split}: set retrieve.{split}_windows above 0")
    places = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)
    return whole.iloc[places].reset_index(drop=True)


def check_finite(nll_N: torch.Tensor) -> None:
    """Raise `FloatingPointError` before what is NaN or Inf is kept: the next run might be luckier."""
    if not torch.isfinite(nll_N).all():
        raise FloatingPointError("scores are NaN or Inf")


def total(score_N: torch.Tensor, owner_N: torch.Tensor, owners: int) -> np.ndarray:
    """Sum of the scores of each owner, in float64."""
    return np.bincount(owner_N.cpu().numpy(), score_N.double().cpu().numpy(), minlength=owners)


def _last(tokens: list[int], count: int, owner: int) -> Reading:
    """The last `count` tokens are scored, never the first of all."""
    first = max(1, len(tokens) - count)
    targets = tokens[first:]
    return Reading(tokens[:-1], list(range(first - 1, len(tokens) - 1)), targets, [owner] * len(targets))


Sizes = Sequence[int]  # tokens that the model reads for each item


class Memory:
    """What one state of the model has answered: read from the store where it stands there, else scored and kept.

    Every suite keeps its answers so, one `Ledger` for each plan and task, one record for each item, addressed by
    content: weights, item, settings and code. So a run that was killed goes on after the last batch, and plans, windows
    and items that are new are the only ones that are scored. An answer that is found was read in the batch of its time:
    next to other items its last digits might differ.
    """

    def __init__(self, store: Store | None = None, identity: Any = None, progress: Progress | None = None) -> None:
        """`identity`: all that an answer depends on but item and suite; `progress` counts tokens of what is scored.

        Without a store nothing is kept.
        """
        self.store, self.identity, self.progress = store, identity, progress

    def known(self, place: Any) -> dict[str, JSON]:
        return self._ledger(place).records if self.store else {}

    def _ledger(self, place: Any) -> Ledger:
        assert self.store is not None
        return Ledger(self.store, digest({"stage": "evaluate", "identity": self.identity, "place": place}))

    def recall(
        self,
        place: Any,
        keys: Sequence[str],
        sizes: Sizes,
        score: Callable[[list[int]], Iterator[dict[int, JSON]]],
    ) -> list[JSON]:
        """The record of each item of `keys`; `score` yields those of the missing ones, batch by batch."""
        ledger = self._ledger(place) if self.store else None
        records = ledger.records if ledger else {}
        missing = [item for item, key in enumerate(keys) if key not in records]
        for batch in score(missing) if missing else ():
            fresh = {keys[item]: record for item, record in batch.items()}
            if ledger:
                ledger.add(fresh)
            else:
                records |= fresh
            if self.progress:
                self.progress.advance(sum(sizes[item] for item in batch))
        return [records[key] for key in keys]


@dataclass
class Scored:
    """A model in one state, and what the suites read with it.

    `reference` are the cached hidden states of the unquantised model, window by window (`Windows.parted`),
    `reference_head` its head where plans have others; `own` are the hidden states of this model, where they are known
    already. `harness` are the tasks of suite downstream, `limit` how many items of each of them are asked;
    `memory` holds what this state has answered before.
    """

    model: Any
    head: Head
    windows: Windows
    items: pd.DataFrame
    reference: Mapping[int, torch.Tensor] | None = None
    own: Mapping[int, torch.Tensor] | None = None
    reference_head: Head | None = None
    harness: Any = None
    memory: Memory = field(default_factory=Memory)
    limit: int | None = None

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """Scores of every token, and the `window` that it lies in: one forward pass, shared by the suites."""
        windows = self.windows
        sizes = [len(reading.tokens) for reading in windows.readings]
        place = windows_place(divergence=self.reference is not None)
        records = self.memory.recall(place, windows.keys, sizes, self._windows)
        scores = [{name: _unpack(text) for name, text in record.items()} for record in records]
        columns = {name: np.concatenate([each[name] for each in scores]) for name in scores[0]}
        return pd.DataFrame(columns | {"window": np.repeat(range(len(scores)), [len(each["nll"]) for each in scores])})

    def _windows(self, missing: list[int]) -> Iterator[dict[int, JSON]]:
        """The scores of windows, in float32."""
        before, own = self.reference, self.own
        for batch in self.windows.some(missing):
            owners = [owner for owner, _ in batch.parted(batch.owner_N)]
            with torch.inference_mode():
                h_ND = hidden(self.model, batch) if own is None else torch.cat([own[owner] for owner in owners])
                reference_ND = None if before is None else torch.cat([before[owner] for owner in owners])
                scores = compare(self.head, batch, h_ND, reference_ND, self.reference_head)
            check_finite(scores["nll"])
            del scores["greedy"]  # of items
            found: dict[int, dict[str, str]] = {owner: {} for owner in owners}
            for name, score_N in scores.items():
                for owner, part in batch.parted(score_N.cpu()):
                    found[owner][name] = _pack(part.numpy())
            yield found

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Their means over every window."""
        return self.windows.means(self.tokens)


def windows_place(*, divergence: bool) -> list[Any]:
    """Where in the memory of a plan the scores of windows lie."""
    return ["windows", divergence]


def _pack(score_N: np.ndarray) -> str:
    return base64.b64encode(score_N.astype("<f4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


Responses = tuple[pd.DataFrame, dict[str, str]]  # rows of RESPONSES without `plan`, and task -> protocol
