"""Reading a text in pieces and going on from it, whatever a model remembers it by: keys and values, or a state."""

from __future__ import annotations

import copy
from typing import Any

import torch


class Reader:
    """A causal model of `transformers` and what it has read so far, for B sequences of equal length at once."""

    def __init__(self, model: Any) -> None:
        self.model, self.memory = model, None
        # state spaces have a name of their own for it
        self._name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"

    def read(self, tokens_BT: torch.Tensor, *, last: int = 0) -> torch.Tensor:
        """Logits [B, T, V] of the next token behind every token, or behind the `last` ones alone."""
        known = {self._name: self.memory} if self.memory is not None else {}
        out = self.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=last, **known)
        self.memory = out[self._name]
        return out.logits

    def fork(self) -> Reader:
        """A second reader that has read the same, and goes its own way."""
        return copy.copy(self)._remember(copy.deepcopy(self.memory))

    def _remember(self, memory: Any) -> Reader:
        self.memory = memory
        return self

    @property
    def states(self) -> list[torch.Tensor]:
        """S_BHPN of every layer of a Mamba2, as it is now: what is written into it, the model goes on from."""
        return [layer.recurrent_states[0] for layer in self.memory.layers]


def greedy(reader: Reader, logits_BV: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The next `steps` tokens [B, steps], each the likeliest, and how many logits [B] on the way were not finite.

    `logits_BV` are those behind the last token that was read. Ends of text do not end it.
    """
    tokens, broken_B = [], torch.zeros(len(logits_BV), dtype=torch.long, device=logits_BV.device)
    for step in range(steps):
        if step:
            logits_BV = reader.read(tokens[-1][:, None])[:, -1]
        broken_B += (~logits_BV.isfinite()).sum(-1)
        tokens.append(logits_BV.argmax(-1))
    return torch.stack(tokens, 1), broken_B
