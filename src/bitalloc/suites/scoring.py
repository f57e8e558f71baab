"""Scores of next tokens from final hidden states: what every suite measures with.

A forward pass of the model without its head is the expensive part, so it is made once and serves all suites
that read the same tokens. The head stays unquantised, hence the reference's log-probabilities can be had
again, exactly, from its cached hidden states: no tensor of [tokens, vocabulary] is ever kept.

Legend: B sequences of a batch, T tokens of a sequence, D hidden width, V vocabulary, N scored positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812

from bitalloc.errors import BitallocError

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
        module = model.get_output_embeddings()
        self.module, self.inputs = module, model.get_input_embeddings()
        self.weight_VD = module.weight.detach().float()
        self.bias_V = None if getattr(module, "bias", None) is None else module.bias.detach().float()
        probe = torch.arange(min(8, len(self.weight_VD)), device=self.weight_VD.device)[None]
        with torch.inference_mode():
            h_ND = model.base_model(input_ids=probe, use_cache=False).last_hidden_state[0].float()
            expected = model(input_ids=probe, use_cache=False).logits[0].float()
        tolerance = 1e-4 if module.weight.dtype == torch.float32 else 0.05
        if not torch.allclose(self.logits(h_ND), expected, rtol=tolerance, atol=tolerance * expected.std().item()):
            raise BitallocError(
                f"{type(model).__name__} does more than a linear map after its last hidden state; "
                "its logits cannot be scored yet: teach bitalloc/suites/scoring.py"
            )

    def logits(self, h_ND: torch.Tensor) -> torch.Tensor:
        return F.linear(h_ND, self.weight_VD, self.bias_V)

    def refuse(self, model: Any, layers: Iterable[str]) -> None:
        """Raise when a plan touches the head or what is tied to it: the cached reference would be wrong."""
        kept = {name for name, module in model.named_modules() if module is self.module or module is self.inputs}
        if touched := sorted(kept.intersection(layers)):
            raise BitallocError(
                f"a plan quantises {touched[0]}: take it out, the head and embeddings are not scored so"
            )


def compare(head: Head, batch: Batch, h_ND: torch.Tensor, reference_ND: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Scores of every position: `nll` (nats), `greedy` (the target is the argmax), `kl` (nats) and `top1`.

    nll = -log q(target). kl = sum_v p(v) (log p(v) - log q(v)), the reference's p over the full vocabulary;
    top1 = both have the same argmax. The last two need the reference's hidden states.
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
            log_p = head.logits(reference_ND[span].to(device)).log_softmax(-1)
            scores["top1"] = (best == log_p.argmax(-1)).float()
            scores["kl"] = (log_p.exp() * log_q.neg_().add_(log_p)).sum(-1)
        for name, score_N in scores.items():
            found.setdefault(name, []).append(score_N)
    return {name: torch.cat(parts) for name, parts in found.items()}


class Windows:
    """The token windows of one split, ready to be read.

    Every token but the first of a window is scored; with a stride only the last `stride` tokens are, as when a
    window slides over the text by `stride` tokens and scores what is new, each with the context before it.
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
        readings = [
            _last(np.asarray(tokens).tolist(), self.stride, owner) for owner, tokens in enumerate(frame["tokens"])
        ]
        self.device, self.budget = device, batch * self.longest  # tokens a forward pass
        self.batches = batches(readings, tokens=self.budget, device=device)

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

    @torch.inference_mode()
    def scores(
        self, head: Head, hidden: Iterable[torch.Tensor], reference: Sequence[torch.Tensor] | None = None
    ) -> pd.DataFrame:
        """Mean `nll`, and `kl` and `top1` where a reference is given, with `tokens` scored, one row a window."""
        sums: dict[str, np.ndarray] = {}
        for place, (batch, h_ND) in enumerate(zip(self.batches, hidden, strict=True)):
            scores = compare(head, batch, h_ND, None if reference is None else reference[place])
            for name, score_N in {**scores, "tokens": torch.ones_like(scores["nll"])}.items():
                sums[name] = sums.get(name, 0) + total(score_N, batch.owner_N, len(self.frame))
        count = sums.pop("tokens")
        return pd.DataFrame({name: values / count for name, values in sums.items()} | {"tokens": count})

    def responses(self, suite: str, metric: str, value: pd.Series, weight: pd.Series) -> pd.DataFrame:
        """Rows of RESPONSES without `plan`, one a window; the task is <corpus>/<split>."""
        task = self.frame["corpus"] + "/" + self.frame["split"]
        item = self.frame["window"].astype("int64")
        columns = {"suite": suite, "task": task, "metric": metric, "item": item, "group": self.frame["corpus"]}
        return pd.DataFrame({**columns, "value": value, "weight": weight.astype("float64")})


def total(score_N: torch.Tensor, owner_N: torch.Tensor, owners: int) -> np.ndarray:
    """Sum of the scores of each owner, in float64."""
    return np.bincount(owner_N.cpu().numpy(), score_N.double().cpu().numpy(), minlength=owners)


def _last(tokens: list[int], count: int, owner: int) -> Reading:
    """The last `count` tokens are scored, never the first of all."""
    first = max(1, len(tokens) - count)
    targets = tokens[first:]
    return Reading(tokens[:-1], list(range(first - 1, len(tokens) - 1)), targets, [owner] * len(targets))


@dataclass
class Scored:
    """A model in one state, and what the suites read with it.

    `reference` are the cached hidden states of the unquantised model over `windows`; `own` those of this
    model, where they are known already. `harness` are the tasks of suite downstream, `identity` says which weights
    the model has.
    """

    model: Any
    head: Head
    windows: Windows
    items: pd.DataFrame
    reference: Sequence[torch.Tensor] | None = None
    own: Sequence[torch.Tensor] | None = None
    harness: Any = None
    identity: str = ""

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Scores of every window: one forward pass, shared by the suites."""
        own = self.own or (hidden(self.model, batch) for batch in self.windows.batches)
        return self.windows.scores(self.head, own, self.reference)


Responses = tuple[pd.DataFrame, dict[str, str]]  # rows of RESPONSES without `plan`, and task -> protocol
