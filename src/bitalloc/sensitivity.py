"""Sensitivity: what a unit of relative error in one matrix costs in KL -> SENSITIVITY.

`kl` puts one matrix at a time at the probe option (`probe_bits`, rank 0) and measures the mean KL per token to
the unquantised model. `fisher` predicts the same for all matrices from one backward pass. Both are divided by
the probe's rel_error, so that coefficient x rel_error predicts the KL of any other option.

Legend: W_OI a matrix of O outputs and I inputs, E_OI the probe's error, H_II the second moment of its input,
B sequences, T tokens, D hidden width, N scored positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.experiments import Experiments
from bitalloc.models import get_weight, load_model, set_weight
from bitalloc.option import Option, usual_group
from bitalloc.progress import Progress
from bitalloc.provenance import source_digest
from bitalloc.store import JSON, Store, digest
from bitalloc.suites import Head, Windows, intervals, spread
from bitalloc.suites.scoring import CHUNK, Batch, hidden, total
from bitalloc.tables import SENSITIVITY

SMALLEST_KL = 1e-9  # nats; float32 cannot tell smaller ones from 0, and a coefficient of 0 would be free
RESAMPLES = 2000

Measured = Iterator[tuple[str, np.ndarray]]  # layer, KL of every window


def probe(sweep: config.Sweep, settings: config.Sensitivity) -> Option:
    """The option that is measured: the first quantiser, `probe_bits`, rank 0, the group size nearest to 64.

    >>> probe(config.Sweep(group_sizes=[32, 128]), config.Sensitivity()).name
    'gptq-3b-g32-r0'
    """
    if settings.probe_bits >= 16:
        raise BitallocError("sensitivity.probe_bits of 16 changes nothing; set it to 2, 3, 4 or 8")
    return Option(sweep.quantizers[0], settings.probe_bits, usual_group(sweep), 0, sweep.factor_bits, sweep.symmetric)


def sensitivity(
    *,
    experiments: Experiments,
    tokens: pd.DataFrame,
    settings: config.Sensitivity,
    store: Store | None = None,
    batch: int = 8,
    seed: int = 0,
    remote_code: bool = False,
    split: str = "calibrate",
) -> pd.DataFrame:
    """The SENSITIVITY frame: `settings.signals` of every claimed matrix, each a shard as soon as it is known.

    Scores `settings.windows` windows of the split, evenly over its corpora; `batch` windows a forward
    pass. Shards lie in the store of `experiments`, or in `store`. Raises `BitallocError` when a KL is NaN or Inf.
    """
    option, inventory, device = probe(experiments.sweep, settings), experiments.inventory, experiments.device
    store = experiments.store if store is None else store
    layers = list(inventory.loc[inventory["claimed"], "layer"])
    errors = experiments.rows(layers, [option]).set_index("layer")
    bench = _Bench(
        experiments=experiments,
        option=option,
        windows=Windows(spread(tokens, settings.windows, split), batch=batch, device=device),
        seed=seed,
        remote_code=remote_code,
    )
    signals: dict[str, Callable[[list[str]], Measured]] = {"kl": bench.kl, "fisher": bench.fisher}
    code, windows = source_digest("bitalloc.sensitivity"), bench.windows.frame
    scored = [window.tolist() for window in map(np.asarray, windows["tokens"])]
    base = digest([code, scored, sorted(inventory["digest"]), device.type, batch])
    progress = Progress("sensitivity", len(layers) * len(settings.signals), unit="matrices")
    rows = []
    for signal in settings.signals:
        keys = {layer: digest([base, signal, errors.at[layer, "key"], seed * (signal == "fisher")]) for layer in layers}
        found: dict[str, JSON] = {layer: record for layer in layers if (record := store.get(keys[layer])) is not None}
        progress.advance(len(found), cached=True)
        for layer, kl_W in signals[signal]([layer for layer in layers if layer not in found]):
            if not np.isfinite(kl_W).all():
                raise BitallocError(f"{layer} at {option.name} makes the model's scores NaN or Inf; check its weights")
            found[layer] = {"kl": kl_W.tolist()}
            store.put(keys[layer], found[layer])
            progress.advance(note=f"{signal} {layer}")
        for layer in layers:
            rows.append(_row(signal, errors.loc[layer], found[layer]["kl"], windows["corpus"], seed) | {"layer": layer})
    return pd.DataFrame(rows)[SENSITIVITY.names]


def _row(signal: str, error: pd.Series, kl_W: list[float], corpus: pd.Series, seed: int) -> dict[str, Any]:
    interval = intervals.mean(kl_W, np.ones(len(kl_W)), corpus, resamples=RESAMPLES, seed=seed)
    # a matrix that the probe stores exactly has no error to divide by; any error would cost next to nothing
    relative = max(float(error["rel_error"]), math.ulp(1.0))
    return {
        **error[["model", "block", "role", "kind"]],
        "signal": signal,
        "coefficient": max(interval.value, SMALLEST_KL) / relative,
        "kl_nats_per_token": interval.value,
        "lo": interval.lo,
        "hi": interval.hi,
        "rel_error": error["rel_error"],
    }


class _Bench:
    """The model and its windows, loaded when something has to be measured."""

    def __init__(
        self,
        *,
        experiments: Experiments,
        option: Option,
        windows: Windows,
        seed: int,
        remote_code: bool,
    ) -> None:
        self.experiments, self.option = experiments, option
        self.path, self.family = experiments.checkpoint.path, experiments.checkpoint.family
        self.windows, self.device = windows, windows.device
        self.seed, self.remote_code = seed, remote_code

    @cached_property
    def model(self) -> Any:
        return load_model(self.path, device=self.device, remote_code=self.remote_code).requires_grad_(False)

    @cached_property
    def head(self) -> Head:
        return Head(self.model)

    def kl(self, layers: list[str]) -> Measured:
        """Mean KL(reference || model with one matrix at the probe) per token: sum_v p log(p / q), float32.

        A change in block k leaves the blocks before it as they were, so each pass starts at block k.
        """
        if not layers:
            return
        suffix = _Suffix(self.model, self.model.get_submodule(self.family.blocks), self.windows.batches)
        reference = list(suffix.hidden())
        for layer in sorted(layers, key=lambda layer: self.experiments.layers[layer]["block"]):
            while suffix.index < self.experiments.layers[layer]["block"]:
                suffix.advance()
            W_OI = get_weight(self.model, self.family, layer)
            set_weight(self.model, self.family, layer, self.experiments.matrix(layer, self.option).dequantize())
            scores = self.windows.scores(self.head, suffix.hidden(), reference)
            set_weight(self.model, self.family, layer, W_OI)
            yield layer, scores["kl"].to_numpy()

    def fisher(self, layers: list[str]) -> Measured:
        """KL ~ 1/2 tr(G_OO E H E^T) per token, G = E[g g^T] of the gradients g_O of the summed loss at the outputs.

        Kronecker-factored Fisher (Martens and Grosse 2015, sect. 3) with labels drawn from the model itself. G is
        never formed: tr(G E H E^T) = E[(g E) H (g E)^T].
        """
        if not layers:
            return
        sums = {layer: np.zeros(len(self.windows.frame)) for layer in layers}
        count = np.zeros(len(self.windows.frame))
        generator, head = torch.Generator(self.device).manual_seed(self.seed), self.head
        for batch in self.windows.batches:
            with self._gradients(layers, partial(self._add, sums, batch)):
                h_ND = hidden(self.model, batch)
                h_ND.backward(_sampled_gradient(head, h_ND.detach(), generator))
            count += total(torch.ones_like(batch.owner_N), batch.owner_N, len(count))
        for layer in layers:
            yield layer, sums[layer] / count

    @contextmanager
    def _gradients(self, layers: list[str], use: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Call `use(layer, g_BTO)` with the gradient at the output of every layer as it becomes known."""

        def start(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.detach().requires_grad_()

        def watch(module: nn.Module, args: Any, output: torch.Tensor, layer: str) -> None:
            output.register_hook(partial(use, layer))

        handles = [self.model.get_input_embeddings().register_forward_hook(start)]
        for layer in layers:
            handles.append(self.model.get_submodule(layer).register_forward_hook(partial(watch, layer=layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, sums: dict[str, np.ndarray], batch: Batch, layer: str, g_BTO: torch.Tensor) -> None:
        What_OI = self.experiments.matrix(layer, self.option).dequantize().to(self.device)
        E_OI = get_weight(self.model, self.family, layer) - What_OI
        H_II = self.experiments.H(self.experiments.layers[layer]["site"]).to(self.device)
        gE_NI = g_BTO.reshape(-1, len(E_OI))[batch.flat_N].float() @ E_OI
        sums[layer] += total(((gE_NI @ H_II) * gE_NI).sum(-1) / 2, batch.owner_N, len(sums[layer]))


@torch.no_grad()
def _sampled_gradient(head: Head, h_ND: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of sum -log p(y) by h_ND, y drawn from p: (p - onehot(y)) times the head's matrix."""
    size = max(1, CHUNK // len(head.weight_VD))
    parts = []
    for part_ND in h_ND.split(size):
        p_NV = head.logits(part_ND).softmax(-1)
        drawn_N1 = torch.multinomial(p_NV, 1, generator=generator)
        parts.append(p_NV.scatter_add_(-1, drawn_N1, -torch.ones_like(p_NV[:, :1])) @ head.weight_VD)
    return torch.cat(parts)


class _Suffix:
    """The model from block `index` on; what enters that block in every batch has been computed before."""

    def __init__(self, model: Any, blocks: nn.ModuleList, batches: list[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.index = 0
        self.inputs: list[torch.Tensor] | None = None  # [B, T, D] each; None: the model starts from the tokens

    @torch.inference_mode()
    def hidden(self) -> Iterator[torch.Tensor]:
        """Final hidden states h_ND of every batch."""
        for place, batch in enumerate(self.batches):
            with self._starting(place):
                h_ND = hidden(self.model, batch)
            yield h_ND

    def advance(self) -> None:
        """Go one block further, with the weights that the model has now."""
        entered: list[torch.Tensor] = []
        handle = self.blocks[self.index + 1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        try:
            for _ in self.hidden():
                pass
        finally:
            handle.remove()
        self.index, self.inputs = self.index + 1, entered

    @contextmanager
    def _starting(self, place: int) -> Iterator[None]:
        """Blocks before `index` pass on what they get, and block `index` gets what was kept for it."""
        if self.inputs is None:
            yield
            return
        for block in self.blocks[: self.index]:
            block.forward = lambda hidden_BTD, *args, **kwargs: hidden_BTD
        enter = self.blocks[self.index].register_forward_pre_hook(lambda module, args: (self.inputs[place], *args[1:]))
        try:
            yield
        finally:
            enter.remove()
            for block in self.blocks[: self.index]:
                del block.forward
