"""One generation of a variant that a process holds. Clocks: CUDA events, or wall time on a CPU."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bitalloc.profile.memory import high_water, peaks, set_back
from bitalloc.profile.variants import Loaded, Variant, load


@dataclass(frozen=True)
class Generation:
    """Seconds of one generation: until the first token, and from each token to the next."""

    batch: int
    length: int
    first_s: float
    gaps_s: Sequence[float]

    def metrics(self) -> dict[str, float]:
        """N tokens for each of B prompts of L tokens, T the whole latency:

        ttft = time to the first token; tpot = (T - ttft) / (N - 1); itl = median of the gaps;
        prefill tokens/s = B L / ttft; decode tokens/s = B (N - 1) / (T - ttft).

        >>> found = Generation(batch=2, length=100, first_s=0.5, gaps_s=[0.1, 0.1, 0.4]).metrics()
        >>> {name: round(value, 3) for name, value in found.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'ttft_ms': 500.0, 'tpot_ms': 200.0, 'itl_ms': 100.0, 'latency_ms': 1100.0, 'prefill_tokens_per_s': 400.0,
         'decode_tokens_per_s': 10.0}
        """
        rest_s = sum(self.gaps_s)
        return {
            "ttft_ms": 1e3 * self.first_s,
            "tpot_ms": 1e3 * rest_s / len(self.gaps_s),
            "itl_ms": 1e3 * float(np.median(self.gaps_s)),
            "latency_ms": 1e3 * (self.first_s + rest_s),
            "prefill_tokens_per_s": self.batch * self.length / self.first_s,
            "decode_tokens_per_s": self.batch * len(self.gaps_s) / rest_s,
        }


class Wall:
    """Marks on the wall clock; `now` gives seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._at = now, list[float]()

    def mark(self) -> None:
        self._at.append(self._now())

    def seconds(self) -> list[float]:
        """Between the marks."""
        return [after - before for before, after in pairwise(self._at)]


class Events:
    """Marks in the stream of a GPU, which goes on meanwhile."""

    def __init__(self) -> None:
        self._at: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._at.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._at)]


Clock = Wall | Events


@torch.inference_mode()
def prefill(model: Any, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """(the first token of each sequence [B, 1], the cache that the next step takes)."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return _step(model, tokens_BT, last)


@torch.inference_mode()
def _step(model: Any, tokens_BT: torch.Tensor, given: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    out = model(input_ids=tokens_BT, use_cache=True, **given)
    cache = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}
    return out.logits[:, -1:].argmax(-1), cache


def generate(model: Any, tokens_BT: torch.Tensor, new: int, clock: Clock) -> Generation:
    """Read the prompts and write `new` tokens each, a mark after every one."""
    clock.mark()
    token_B1, cache = prefill(model, tokens_BT)
    clock.mark()
    for _ in range(new - 1):
        token_B1, cache = _step(model, token_B1, cache)
        clock.mark()
    first_s, *gaps_s = clock.seconds()
    return Generation(*tokens_BT.shape, first_s, gaps_s)


class Holder:
    """One variant in a process of its own, which is asked for generations or for peaks of memory."""

    def __init__(self, variant: Variant, seed: int, compiled: bool = False) -> None:
        self._seed = seed
        self._libraries = {"libraries_mem_mb": high_water() if variant.device == "cpu" else None}
        set_back(variant.device)
        start = time.perf_counter()
        self._loaded: Loaded = load(variant)
        self._device = torch.device(variant.device)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.load_s = time.perf_counter() - start
        self._load = peaks("load", self._device.type)
        self._vocabulary = self._loaded.model.config.vocab_size
        if compiled:
            self._loaded.model.forward = torch.compile(self._loaded.model.forward)

    def facts(self) -> tuple[dict[str, Any], dict[str, float | None]]:
        """(columns of RECORDS, metrics) that hold for every batch and length."""
        facts = dict(self._loaded.facts)
        nbytes = facts.pop("nbytes")
        return facts, {"nbytes": nbytes, "load_s": self.load_s, **self._libraries, **self._load}

    def generate(self, batch: int, length: int, new: int) -> Generation:
        clock = Events() if self._device.type == "cuda" else Wall()
        return generate(self._loaded.model, self._prompts(batch, length), new, clock)

    def memory(self, batch: int, length: int, new: int) -> dict[str, float | None]:
        """Peaks while the prompts are read, and while `new` tokens are written."""
        model, kind = self._loaded.model, self._device.type
        token, cache = prefill(model, self._prompts(1, 2))  # what is imported and unpacked at the first call
        _step(model, token, cache)
        del token, cache
        tokens_BT = self._prompts(batch, length)
        set_back(kind)
        token_B1, cache = prefill(model, tokens_BT)
        found = peaks("prefill", kind)
        set_back(kind)
        for _ in range(new - 1):
            token_B1, cache = _step(model, token_B1, cache)
        return found | peaks("decode", kind)

    def _prompts(self, batch: int, length: int) -> torch.Tensor:
        """Tokens [B, L], equal for every variant."""
        draw = np.random.default_rng([self._seed, batch, length])
        return torch.from_numpy(draw.integers(self._vocabulary, size=(batch, length))).to(self._device)
