"""A model put into a scheme, matrix by matrix.

Shapes: O outputs, I inputs of a matrix W_OI, G groups of inputs, g inputs of one, S tokens of a sample, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from logging import getLogger
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bitalloc.errors import BitallocError
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
from bitalloc.schemes.calibration import Calibration
from bitalloc.schemes.folding import fold
from bitalloc.schemes.linear import QuantLinear
from bitalloc.schemes.matrices import Matrix, Scope, Unit, device_of, scope
from bitalloc.strategies.instance import Instance
from bitalloc.strategies.optimal import optimal
from bitalloc.suites import Head

DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
DAMPING = 0.1  # of sweep.damping
OFFERED = range(2, 9)  # bits that `dp` chooses from
PROBE = 3  # bits at which it measures what an error costs


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
        windows, head = self.calibration.windows(device_of(self.model)), Head(self.model)
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
        return Rotation(matrix.columns, seed=self.seed, device=device_of(self.model))

    def _factor(self, matrix: Matrix) -> Factor:
        assert self.calibration is not None
        if matrix.site not in self._factors:
            self._factors.clear()  # one is held, and matrices of a site come one after another
            H_II, rotation = self.calibration.H[matrix.site].to(device_of(self.model)), self._rotation(matrix)
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
        X_SI, rotation = self.calibration.X[matrix.site].to(device_of(self.model)), self._rotation(matrix)
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


def _count(matrix: Matrix, unit: Unit) -> int:
    return len(range(*unit.rows.indices(matrix.rows)))
