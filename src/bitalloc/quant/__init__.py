"""The quantiser family: stacked targets and the moments of their input -> codes, scales and zeros.

A member is one file and one entry of `QUANTIZERS`; tests/quant/test_contract.py holds it to the contract.

Shapes: O outputs (rows), I inputs (columns), G groups of columns, R rank or, in X_IR, rows of all stacked matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitalloc.errors import BitallocError, nearest
from bitalloc.option import PASS_THROUGH, Option
from bitalloc.quant.factor import Factor, Order
from bitalloc.quant.gptq import gptq
from bitalloc.quant.grid import Grid, Stack
from bitalloc.quant.packing import pack, unpack
from bitalloc.quant.rtn import rtn

__all__ = ["QUANTIZERS", "CompressedMatrix", "Factor", "Grid", "Order", "Quantizer", "Stack", "quantizer"]


class Quantizer(Protocol):
    """Quantise stacked rows, inputs first and in `order`, each to its own bits.

    X_IR (float32, contiguous) is overwritten with the residual. The result of an item must not depend on
    what it is stacked with, and more bits must not make it worse.
    """

    def __call__(self, X_IR: Tensor, stack: Stack, order: Order) -> Grid: ...


QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn, "gptq": gptq}


def quantizer(name: str) -> Quantizer:
    """The quantiser of that name; raises `BitallocError` with the nearest valid name."""
    if name not in QUANTIZERS:
        raise BitallocError(f"unknown quantizer {name!r} in sweep.quantizers: {nearest(name, QUANTIZERS)}")
    return QUANTIZERS[name]


@dataclass(frozen=True)
class CompressedMatrix:
    """W_OI as it is stored: (codes - zero) * scale for each group, plus L R.

    The pass-through holds `weight_OI` (float16 or bfloat16) and nothing else.
    """

    option: Option
    rows: int
    columns: int
    codes_OI: Tensor | None = None  # uint8
    scale_OG: Tensor | None = None  # float16
    zero_OG: Tensor | None = None  # uint8; None when symmetric: the zero is then 2^(bits-1)
    L_OR: Tensor | None = None  # int8 or float16
    R_RI: Tensor | None = None
    L_scale_R: Tensor | None = None  # float16; None for 16-bit factors
    R_scale_R: Tensor | None = None
    weight_OI: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of `tensors()`; equals `option.nbytes(rows, columns)`."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dequantize(self) -> Tensor:
        """What_OI, float32."""
        if self.weight_OI is not None:
            return self.weight_OI.float()
        return self.quantised_part() + self.lowrank_part() if self.option.rank else self.quantised_part()

    def quantised_part(self) -> Tensor:
        """(codes - zero) * scale, float32 [O, I]."""
        zero_OG = self.zero_OG
        if zero_OG is None:
            zero_OG = torch.full_like(self.scale_OG, 2 ** (self.option.bits - 1))
        size = self.option.group_size
        zero_OI, scale_OI = (
            t.float().repeat_interleave(size, dim=1)[:, : self.columns] for t in (zero_OG, self.scale_OG)
        )
        return (self.codes_OI.float() - zero_OI) * scale_OI

    def lowrank_part(self) -> Tensor:
        """L R, float32 [O, I]; zeros at rank 0."""
        if not self.option.rank:
            return torch.zeros(self.rows, self.columns)
        L_OR, R_RI = self.factors()
        return L_OR @ R_RI

    def factors(self) -> tuple[Tensor, Tensor]:
        """L [O, R] and R [R, I], float32; rank > 0."""
        L_OR, R_RI = self.L_OR.float(), self.R_RI.float()
        if self.L_scale_R is not None:
            L_OR, R_RI = L_OR * self.L_scale_R.float(), R_RI * self.R_scale_R.float()[:, None]
        return L_OR, R_RI

    def tensors(self) -> dict[str, Tensor]:
        """What goes to disk, by name: packed codes and zeros, the rest as it is.

        weight uint8 [O ceil(I bits / 8)], scale float16 [O, G], zero uint8 [ceil(O G bits / 8)] (one stream),
        L [O, R], R [R, I], L_scale and R_scale float16 [R]; or weight [O, I]. Absent parts have no entry.
        """
        if self.weight_OI is not None:
            return {"weight": self.weight_OI}
        packed = {"weight": pack(self.codes_OI, self.option.bits).flatten(), "scale": self.scale_OG}
        if self.zero_OG is not None:
            packed["zero"] = pack(self.zero_OG.reshape(1, -1), self.option.bits)[0]
        factors = {"L": self.L_OR, "R": self.R_RI, "L_scale": self.L_scale_R, "R_scale": self.R_scale_R}
        return packed | {name: tensor for name, tensor in factors.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, option: Option, rows: int, columns: int, tensors: Mapping[str, Tensor]) -> CompressedMatrix:
        """The inverse of `tensors()`. Raises `BitallocError` when they are not those of this option."""
        if sum(tensor.nbytes for tensor in tensors.values()) != option.nbytes(rows, columns):
            raise BitallocError(
                f"stored tensors {sorted(tensors)} are not a [{rows}, {columns}] matrix at {option.name}; "
                "delete them and rerun, they are made again"
            )
        if option.quantizer == PASS_THROUGH:
            return cls(option, rows, columns, weight_OI=tensors["weight"])
        groups = -(-columns // option.group_size)
        zero = tensors.get("zero")
        return cls(
            option,
            rows,
            columns,
            codes_OI=unpack(tensors["weight"].view(rows, -1), option.bits, columns),
            scale_OG=tensors["scale"],
            zero_OG=None if zero is None else unpack(zero[None], option.bits, rows * groups).view(rows, groups),
            L_OR=tensors.get("L"),
            R_RI=tensors.get("R"),
            L_scale_R=tensors.get("L_scale"),
            R_scale_R=tensors.get("R_scale"),
        )
