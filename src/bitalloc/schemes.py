"""Schemes applied: the Linears of a plain `transformers` model in few bits, weights and activations.

    record = apply(model, "w4a8+gptq+online", calibration=tokens_NT, seed=0)

Scope is the claim of `bitalloc.families`: what a plan may touch is quantised, everything else stays as it is, each with
its reason (`scope`). Of Mamba2 that is in_proj and out_proj of every mixer; conv1d, A_log, D, dt_bias, norms,
embedding and head stay, and so does the recurrent state.

Arithmetic is simulated: codes are rounded, then computed with as floats. It says what a scheme costs in quality,
nothing of its speed. `@torchao` and `@compressed-tensors` are those libraries' own, the second a simulation too.

Shapes: O outputs, I inputs of a matrix W_OI, G groups of inputs, T tokens, S tokens of a sample, N windows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from logging import getLogger
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES, Family
from bitalloc.lowrank import Factor, decompose
from bitalloc.option import Option
from bitalloc.quant.activation import (
    TINY,
    Activation,
    Dynamic,
    Float,
    Static,
    clipped,
    percentile,
    rounded,
    symmetric_scale,
)
from bitalloc.quant.hadamard import Rotation
from bitalloc.scheme import Scheme
from bitalloc.store import digest
from bitalloc.strategies.instance import Instance
from bitalloc.strategies.optimal import optimal
from bitalloc.suites import Head, Windows

__all__ = ["Calibration", "Matrix", "QuantLinear", "Record", "Scheme", "Scope", "Unit", "apply", "calls", "scope"]

DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
DAMPING = 0.1  # of sweep.damping
SAMPLE = 2**20  # activations of a site that are kept for percentiles
OFFERED = range(2, 9)  # bits that `dp` chooses from
PROBE = 3  # bits at which it measures what an error costs


# ---- scope -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Unit:
    """Rows of a matrix that have bits of their own."""

    name: str  # of the whole matrix: its layer; of in_proj of Mamba2: layer.z, .x, .B, .C, .dt
    rows: slice


@dataclass(frozen=True)
class Matrix:
    """A Linear in scope."""

    layer: str
    role: str
    block: int
    site: str
    rows: int
    columns: int
    units: tuple[Unit, ...]
    online: bool  # a scheme's `online` rotates its input


@dataclass(frozen=True)
class Scope:
    """What is quantised and what is not, and why: one row for each kind of tensor, blocks counted."""

    family: Family
    matrices: tuple[Matrix, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def json(self) -> str:
        return json.dumps([dict(row) for row in self.rows], sort_keys=True)

    @property
    def digest(self) -> str:
        return digest([dict(row) for row in self.rows])

    def __str__(self) -> str:
        shown = pd.DataFrame(self.rows).assign(scope=lambda frame: np.where(frame["quantised"], "in", "out"))
        return shown[["scope", "tensor", "count", "shape", "kind", "reason"]].to_string(index=False)


def scope(model: nn.Module) -> Scope:
    """Which tensors of the model are in and which are out; raises `BitallocError` for one that its family leaves open.

    Raises it too for a model of no known family and for matrices that are no `nn.Linear`.
    """
    name = type(model).__name__
    family = next((known for known in FAMILIES.values() if name in known.architectures), None)
    if family is None:
        raise BitallocError(f"no family is known for {name}; add it to bitalloc/families.py")
    matrices, rows = [], {}
    for tensor, parameter in model.named_parameters(remove_duplicate=False):
        role, block, kind, reason = family.claim(tensor)
        pattern = tensor
        if tensor.startswith(f"{family.blocks}."):
            pattern = f"{family.blocks}.*.{tensor.removeprefix(f'{family.blocks}.').partition('.')[2]}"
        facts = {"quantised": role is not None, "kind": kind, "reason": reason or "a Linear of every block"}
        row = rows.setdefault(pattern, {"tensor": pattern, "shape": list(parameter.shape), **facts, "count": 0})
        row["count"] += 1
        if role is None:
            continue
        layer = tensor.removesuffix(".weight")
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise BitallocError(f"{layer} is {type(model.get_submodule(layer)).__name__}, no nn.Linear as schemes need")
        parts = _parts(model.config, family, role.name)
        units = tuple(Unit(f"{layer}.{part}" if part else layer, at) for part, at in parts)
        online = role.site == family.roles[-1].site
        site = f"{block}.{role.site}"
        matrices.append(Matrix(layer, role.name, block, site, *parameter.shape, units=units, online=online))
    if not matrices:
        raise BitallocError(f"{name} has no Linear left to quantise: a scheme was applied to it; load it again")
    return Scope(family, tuple(matrices), tuple(rows.values()))


def _parts(config: Any, family: Family, role: str) -> list[tuple[str, slice]]:
    """Row blocks of a matrix; of in_proj of Mamba2 gate z, input x, B, C and step dt, in the order of its rows."""
    if family.name != "mamba2" or role != "in_proj":
        return [("", slice(None))]
    inner, state = int(config.expand * config.hidden_size), config.n_groups * config.state_size
    sizes = {"z": inner, "x": inner, "B": state, "C": state, "dt": config.num_heads}
    edges = np.cumsum([0, *sizes.values()]).tolist()
    return [(part, slice(a, b)) for part, a, b in zip(sizes, edges, edges[1:], strict=False)]


# ---- calibration -------------------------------------------------------------------------------------
class Calibration:
    """What schemes of one model share: moments H_II of every input in scope, and a sample of it; float32.

    Takes the model as it is: one whose residual stream was rotated has a calibration of its own.
    """

    def __init__(self, model: nn.Module, tokens_NT: Tensor, *, batch: int = 8) -> None:
        """`tokens_NT`: token ids of windows of equal length, from the calibrate split."""
        if tokens_NT.dim() != 2 or not tokens_NT.numel():
            raise BitallocError("schemes are calibrated on windows of equal length: give token ids [windows, tokens]")
        self.tokens_NT, self.batch = tokens_NT, batch
        matrices = {matrix.site: matrix for matrix in scope(model).matrices}
        self.H = {site: torch.zeros(m.columns, m.columns, dtype=torch.float64) for site, m in matrices.items()}
        kept: dict[str, list[Tensor]] = {site: [] for site in matrices}
        steps = {site: -(-tokens_NT.numel() * m.columns // SAMPLE) for site, m in matrices.items()}

        def hook(site: str, x_BTI: Tensor) -> None:
            X_TI = x_BTI.detach().flatten(0, -2).float()
            self.H[site] += (X_TI.T @ X_TI).cpu()
            kept[site].append(X_TI[:: steps[site]].cpu())

        handles = [
            model.get_submodule(m.layer).register_forward_pre_hook(lambda _, args, site=site: hook(site, args[0]))
            for site, m in matrices.items()
        ]
        try:
            with torch.inference_mode():
                for part in tokens_NT.split(batch):
                    model.base_model(input_ids=part.to(_device(model)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.H = {site: (H_II / tokens_NT.numel()).float() for site, H_II in self.H.items()}
        self.X = {site: torch.cat(parts) for site, parts in kept.items()}

    def windows(self, device: torch.device, count: int = 16) -> Windows:
        """At most `count` of the windows, evenly over all, to be scored."""
        places = np.linspace(0, len(self.tokens_NT) - 1, min(count, len(self.tokens_NT))).round().astype(int)
        rows = [self.tokens_NT[place].tolist() for place in places]
        frame = pd.DataFrame({"tokens": rows, "split": "calibrate", "corpus": "calibrate", "window": places})
        return Windows(frame, batch=self.batch, device=device)


# ---- modules -----------------------------------------------------------------------------------------
class QuantLinear(nn.Module):
    """y = What q(R x) + b: a Linear whose weights and input are rounded; `rotation` and `activation` may be None.

    With `kept_O` the marked outputs come from the original weights and input instead: what layerwise sensitivity needs.
    """

    def __init__(
        self, linear: nn.Linear, What_OI: Tensor, activation: Activation | None, rotation: Rotation | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation, self.rotation, self.bias = activation, rotation, linear.bias
        self.register_buffer("What_OI", What_OI.to(linear.weight))
        self.original_OI: Tensor | None = None
        self.kept_O: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """What_OI. Fused kernels take it when training and pass by this module's forward, hence the refusal."""
        if self.training:
            raise BitallocError(
                "a quantised Linear was read in training mode, where a kernel may pass it by: model.eval()"
            )
        return self.What_OI

    def forward(self, x_TI: Tensor) -> Tensor:
        read_TI = x_TI if self.rotation is None else self.rotation(x_TI)
        if self.activation is not None:
            read_TI = self.activation(read_TI)
        y_TO = F.linear(read_TI, self.weight, self.bias)
        if self.kept_O is None:
            return y_TO
        return torch.where(self.kept_O, F.linear(x_TI, self.original_OI, self.bias), y_TO)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.activation}, rotated={self.rotation is not None}"


@contextmanager
def calls(model: nn.Module, layers: list[str]) -> Iterator[Counter[str]]:
    """Counts how often the forward of each of these modules is called meanwhile: 0 for one that is passed by."""
    counts: Counter[str] = Counter(dict.fromkeys(layers, 0))
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: counts.update([layer]))
        for layer in layers
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# ---- application -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Record:
    """What was done to a model."""

    scheme: Scheme
    scope: Scope
    seed: int
    bits: Mapping[str, int]  # of every unit
    nbytes: int  # of the matrices in scope: codes and 16-bit scales
    weights: int  # entries of them
    rotations: int  # at run time, each token

    @property
    def layers(self) -> list[str]:
        return [matrix.layer for matrix in self.scope.matrices]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    def row(self) -> dict[str, Any]:
        """Plain values for a record of a run."""
        told = {"nbytes": self.nbytes, "bits_per_weight": self.bits_per_weight, "rotations": self.rotations}
        return {
            **self.scheme.row(),
            **told,
            "seed": self.seed,
            "scope": self.scope.json,
            "scope_digest": self.scope.digest,
        }


def apply(
    model: nn.Module,
    scheme: Scheme | str,
    *,
    calibration: Calibration | Tensor | None = None,
    seed: int = 0,
    bits: Mapping[str, int] | None = None,
    keep: bool = False,
) -> Record:
    """Put the Linears in scope into the scheme, in place; the model is then in evaluation mode.

    `calibration`: token ids [N, T] of the calibrate split, or what was made of them; plain schemes need none. A
    `Calibration` of the model before a `folded` rotation is made anew from its tokens. `bits`: unit -> bits instead of
    the scheme's own; `keep`: the originals stay beside, for `kept_O`. Raises `BitallocError` where text is missing, and
    where a backend cannot carry the scheme.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    model.eval().requires_grad_(False)
    found = scope(model)
    _check(scheme)
    if calibration is None and scheme.calibrated:
        raise BitallocError(
            f"scheme {scheme.name} is calibrated: give token ids [windows, tokens] of the calibrate split"
        )
    if scheme.folded:
        fold(model, found, seed)
        calibration = calibration.tokens_NT if isinstance(calibration, Calibration) else calibration
    if isinstance(calibration, Tensor) and scheme.calibrated:
        calibration = Calibration(model, calibration)
    work = _Work(model, scheme, calibration if isinstance(calibration, Calibration) else None, seed, keep)
    units = [(matrix, unit) for matrix in found.matrices for unit in matrix.units]
    if bits is None:
        bits = work.allocate(units) if "dp" in scheme.techniques else {unit.name: scheme.w_bits for _, unit in units}
    put = {"simulated": work.simulate, "torchao": work.torchao, "compressed-tensors": work.compressed_tensors}
    return Record(
        scheme,
        found,
        seed,
        bits,
        nbytes=sum(put[scheme.quant_backend](matrix, bits) for matrix in found.matrices),
        weights=sum(matrix.rows * matrix.columns for matrix in found.matrices),
        rotations=sum(matrix.online for matrix in found.matrices) if scheme.online else 0,
    )


@dataclass(frozen=True)
class _Codes:
    """A matrix or a unit of it as it is stored."""

    What_OI: Tensor  # dequantised
    scale_OG: Tensor | None  # None at 16 bits
    nbytes: int


@dataclass
class _Work:
    """A model that is being put into a scheme; `simulate`, `torchao`, `compressed_tensors` do it to one matrix.

    They return its bytes as stored there: both libraries keep a code of fewer than 8 bits in a byte.
    """

    model: nn.Module
    scheme: Scheme
    calibration: Calibration | None
    seed: int
    keep: bool = False
    _factors: dict[str, Factor] = field(default_factory=dict)

    def simulate(self, matrix: Matrix, bits: Mapping[str, int]) -> int:
        linear = self.model.get_submodule(matrix.layer)
        W_OI = self._weight(matrix)
        codes = [self.rounded(W_OI[unit.rows], matrix, bits[unit.name]) for unit in matrix.units]
        What_OI = torch.cat([part.What_OI for part in codes])
        made = QuantLinear(linear, What_OI, self._activation(matrix), self._rotation(matrix))
        made.original_OI = linear.weight.detach() if self.keep else None
        owner, _, name = matrix.layer.rpartition(".")
        setattr(self.model.get_submodule(owner), name, made.eval())
        return sum(part.nbytes for part in codes)

    def torchao(self, matrix: Matrix, bits: Mapping[str, int]) -> int:
        """The library rounds the weights itself, and multiplies integers where both are of 8 bits."""
        scheme = self.scheme
        ao = _library("torchao.quantization", "backends")
        if scheme.w_bits == scheme.a_bits == 8 and scheme.symmetric:
            config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        else:
            grain = ao.PerAxis(0) if scheme.per_channel else ao.PerGroup(scheme.group_size)
            dtype = getattr(torch, f"int{scheme.w_bits}")
            config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=grain)
        ao.quantize_(self.model.get_submodule(matrix.layer), config)
        return matrix.rows * (matrix.columns + 4 * self._groups(matrix))

    def compressed_tensors(self, matrix: Matrix, bits: Mapping[str, int]) -> int:
        """Our codes and scales, its `int-quantized` rounding of the input."""
        scheme, linear = self.scheme, self.model.get_submodule(matrix.layer)
        ct = _library("compressed_tensors.quantization", "huggingface")
        codes = self.rounded(self._weight(matrix), matrix, scheme.w_bits)
        grain = (
            {"strategy": "channel"} if scheme.per_channel else {"strategy": "group", "group_size": scheme.group_size}
        )
        read = {"strategy": "tensor", "dynamic": False} if scheme.static else {"strategy": "token", "dynamic": True}
        args = ct.QuantizationScheme(
            targets=["Linear"],
            weights=ct.QuantizationArgs(num_bits=scheme.w_bits, type="int", symmetric=True, **grain),
            input_activations=ct.QuantizationArgs(
                num_bits=scheme.a_bits, type="int", symmetric=scheme.symmetric, **read
            ),
        )
        ct.initialize_module_for_quantization(linear, args)
        linear.weight.data.copy_(codes.What_OI)
        linear.weight_scale.data.copy_(codes.scale_OG)
        if scheme.static:
            activation = self._activation(matrix)
            assert isinstance(activation, Static)
            linear.input_scale.data.copy_(symmetric_scale(activation.largest, scheme.a_bits))
        linear.quantization_status = ct.QuantizationStatus.FROZEN
        return matrix.rows * (matrix.columns + 2 * self._groups(matrix))

    def _groups(self, matrix: Matrix) -> int:
        return -(-matrix.columns // (self.scheme.group_size or matrix.columns))

    def allocate(self, units: list[tuple[Matrix, Unit]]) -> dict[str, int]:
        """Bits of every unit: least sum of coefficient x rel_error, at no more bytes than all at `w_bits`.

        coefficient = KL / rel_error with that unit alone at 3 bits, on calibrate windows.
        """
        options = [self._option(columns=0, bits=b) for b in OFFERED]
        errors = np.array([self._errors(matrix, unit) for matrix, unit in units])
        kl_U = self._sensitivities(units)
        costs = errors * (kl_U / np.maximum(errors[:, OFFERED.index(PROBE)], TINY))[:, None]
        nbytes = np.array([[self._nbytes(m, u, b) for b in OFFERED] for m, u in units], dtype=np.int64)
        weights = np.array([_count(m, u) * m.columns for m, u in units])
        instance = Instance(tuple(u.name for _, u in units), tuple(options), weights, nbytes, costs)
        choice = optimal(instance, int(nbytes[:, OFFERED.index(self.scheme.w_bits)].sum()))
        return {unit.name: OFFERED[k] for (_, unit), k in zip(units, choice, strict=True)}

    def _sensitivities(self, units: list[tuple[Matrix, Unit]]) -> np.ndarray:
        """KL in nats a token with each unit alone at the probe's bits."""
        assert self.calibration is not None
        windows, head = self.calibration.windows(_device(self.model)), Head(self.model)
        reference, found = windows.hidden(self.model), []
        for matrix, unit in units:
            weight = self.model.get_submodule(matrix.layer).weight.data[unit.rows]
            before = weight.clone()
            What_OI = self.rounded(self._weight(matrix)[unit.rows], matrix, PROBE).What_OI
            back = self._rotation(matrix)
            weight.copy_(What_OI if back is None else back.inverse(What_OI))
            found.append(float(windows.scores(head, windows.hidden(self.model), reference)["kl"].mean()))
            weight.copy_(before)
        return np.maximum(found, 1e-9)  # float32 cannot tell less from 0, and 0 would be free

    def _errors(self, matrix: Matrix, unit: Unit) -> list[float]:
        """rel_error of the unit at every bit offered."""
        W_OI, factor = self._weight(matrix)[unit.rows], self._factor(matrix)
        whole = max(factor.energy(W_OI), TINY)
        return [factor.energy(W_OI - self.rounded(W_OI, matrix, b).What_OI) / whole for b in OFFERED]

    def rounded(self, W_OI: Tensor, matrix: Matrix, bits: int) -> _Codes:
        """Rows of a matrix in that many bits."""
        if self.scheme.w_bits == 16:
            return _Codes(W_OI.to(DTYPE[self.scheme.dtype]).to(W_OI), None, 2 * W_OI.numel())
        option = self._option(matrix.columns, bits)
        nbytes = option.nbytes(*W_OI.shape)
        if option.quantizer == "absmax":
            return _Codes(*absmax(W_OI, bits, option.group_size), nbytes)
        [result] = decompose(W_OI.contiguous(), self._factor(matrix), [option], act_order=True, iterations=1)
        assert result.matrix is not None
        return _Codes(result.matrix.dequantize().to(W_OI), result.matrix.scale_OG.to(W_OI), nbytes)

    def _option(self, columns: int, bits: int) -> Option:
        return Option(self.scheme.calib_method, bits, self.scheme.group_size or columns, 0, symmetric=True)

    def _nbytes(self, matrix: Matrix, unit: Unit, bits: int) -> int:
        return self._option(matrix.columns, bits).nbytes(_count(matrix, unit), matrix.columns)

    def _weight(self, matrix: Matrix) -> Tensor:
        """W_OI as the scheme rounds it, float32."""
        W_OI, rotation = self.model.get_submodule(matrix.layer).weight.detach().float(), self._rotation(matrix)
        return W_OI if rotation is None else rotation(W_OI)

    def _rotation(self, matrix: Matrix) -> Rotation | None:
        if not (self.scheme.online and matrix.online):
            return None
        return Rotation(matrix.columns, seed=self.seed, device=_device(self.model))

    def _factor(self, matrix: Matrix) -> Factor:
        assert self.calibration is not None
        if matrix.site not in self._factors:
            self._factors.clear()  # one is held, and matrices of a site come one after another
            H_II, rotation = self.calibration.H[matrix.site].to(_device(self.model)), self._rotation(matrix)
            H_II = H_II if rotation is None else rotation.moments(H_II)
            self._factors[matrix.site] = Factor(H_II, DAMPING, name=matrix.site)
        return self._factors[matrix.site]

    def _activation(self, matrix: Matrix) -> Activation | None:
        scheme = self.scheme
        if scheme.a_bits == 16:
            return Float(DTYPE[scheme.dtype])
        if not (scheme.static or scheme.clipped):
            return Dynamic(scheme.a_bits, scheme.symmetric)
        assert self.calibration is not None
        X_SI, rotation = self.calibration.X[matrix.site].to(_device(self.model)), self._rotation(matrix)
        X_SI = X_SI if rotation is None else rotation(X_SI)
        if scheme.clipped:
            return clipped(X_SI, scheme.a_bits, symmetric=scheme.symmetric)
        return Static(scheme.a_bits, percentile(X_SI, scheme.percentile))


def _check(scheme: Scheme) -> None:
    """Raise `BitallocError` for what a backend cannot carry."""
    name, refused = scheme.quant_backend, None
    if name == "torchao":
        if {"rtn", "gptq", "dp", "static", "clip", "online"} & set(scheme.techniques):
            refused = "it rounds weights and activations by their largest values, itself"
        elif scheme.a_bits != 8 or scheme.w_bits == 16:
            refused = f"it has no W{scheme.w_bits}A{scheme.a_bits}"
        elif scheme.symmetric and (scheme.w_bits < 8 or not scheme.per_channel):
            refused = "it reads activations with a zero point there: add +asym"
    elif name == "compressed-tensors":
        if {"dp", "online", "clip"} & set(scheme.techniques):
            refused = "a matrix has one width of codes there, tokens their full range, and no operation before them"
        elif 16 in (scheme.w_bits, scheme.a_bits):
            refused = "int-quantized is of integer weights and activations"
    if refused:
        raise BitallocError(f"{name} cannot carry {scheme.name}: {refused}; the simulation can")


def _library(name: str, extra: str) -> ModuleType:
    for noisy in ("torchao", "torch.utils._pytree"):  # they remark on themselves
        getLogger(noisy).setLevel("ERROR")
    try:
        return import_module(name)
    except ImportError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise BitallocError(f"{name} cannot be imported here ({reason}); pip install 'bitalloc[{extra}]'") from None


def absmax(W_OI: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """What_OI to the nearest code and scale_OG, a 16-bit float set by the largest weight of each group of a row."""
    rows, columns = W_OI.shape
    groups_OGg = F.pad(W_OI, (0, -columns % group_size)).view(rows, -1, group_size)
    scale_OG = symmetric_scale(groups_OGg.abs().amax(-1), bits).half().float()
    return rounded(groups_OGg, scale_OG[..., None], bits).view(rows, -1)[:, :columns], scale_OG


@torch.no_grad()
def fold(model: nn.Module, found: Scope, seed: int) -> None:
    """Rotate the residual stream of a Mamba2 by R, in its weights alone: its logits stay what they are.

    Exact, because all that lies between writers and readers of the stream are additions and RMS norms, and a norm
    without weights commutes with R; the norms' weights go into the matrices that read them first. The input of out_proj
    is no such place: gate and norm make it, not a matrix, so its rotation has to be done at run time (`online`).
    """
    if found.family.name != "mamba2":
        raise BitallocError(f"folded: the residual stream of {found.family.name} is not folded yet; take `online`")
    body, head = model.backbone, model.lm_head
    rotation = Rotation(model.config.hidden_size, seed=seed, device=_device(model))
    if head.weight is body.embeddings.weight:  # the head takes the last norm's weights, the embedding does not
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False

    def reads(W_OI: Tensor, norm: nn.Module) -> None:
        W_OI.copy_(rotation(W_OI.float() * norm.weight.float()))
        norm.weight.fill_(1.0)

    def writes(tensor: Tensor | None) -> None:
        if tensor is not None:  # [D, I], or a bias [D]
            tensor.copy_(rotation(tensor.float().T).T)

    body.embeddings.weight.copy_(rotation(body.embeddings.weight.float()))
    for block in body.layers:
        reads(block.mixer.in_proj.weight, block.norm)
        writes(block.mixer.out_proj.weight)
        writes(block.mixer.out_proj.bias)
    reads(head.weight, body.norm_f)


def _count(matrix: Matrix, unit: Unit) -> int:
    return len(range(*unit.rows.indices(matrix.rows)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
