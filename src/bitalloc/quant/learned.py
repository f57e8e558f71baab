"""A compressed matrix that takes gradients: codes, scales, zeros and factors, each through its stored precision.

What is learned stays on the grid of the option, so that bytes, format and every exporter are those of the matrix it
started from. Rounding is straight-through: forward the stored value, backward the identity (Bengio et al. 2013).

Shapes: O outputs, I inputs, G groups, R rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitalloc.quant import CompressedMatrix
from bitalloc.quant.grid import LARGEST, SMALLEST

PARTS = ("rounding", "scales", "zeros", "factors")
EDGE = 0.49  # of the cell of a code
ENTRY = 127.0  # largest entry of an 8-bit factor; 16-bit factors step by this share of their column's largest


class _Through(torch.autograd.Function):
    """The stored value forward, the gradient as it comes backward."""

    @staticmethod
    def forward(_: Any, __: Tensor, stored: Tensor) -> Tensor:
        return stored

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _through(free: Tensor, stored: Tensor) -> Tensor:
    return _Through.apply(free, stored)


class Learned:
    """The parameters of one matrix. `weight()` is exactly `compressed().dequantize()`, with gradients.

    `rounding` is in units of codes: it starts where W - L R lies, or at the border of the cell that the quantiser
    chose where that is another one. `scales` are factors on the stored ones, `zeros` codes, `factors` entries of int8.
    """

    def __init__(self, matrix: CompressedMatrix, W_OI: Tensor, *, nearest: bool = False) -> None:
        """`nearest` forgets the quantiser's codes: round to nearest on its grid."""
        self.matrix, self.device, option = matrix, W_OI.device, matrix.option
        self.top, self.size = 2**option.bits - 1, option.group_size
        self.scale_OG = matrix.scale_OG.to(self.device).float()
        half = torch.full_like(self.scale_OG, 2.0 ** (option.bits - 1))
        zero_OG = half if matrix.zero_OG is None else matrix.zero_OG.to(self.device).float()
        self.parameters = {"scales": [torch.ones_like(self.scale_OG)], "zeros": [], "factors": []}
        lowrank_OI = matrix.lowrank_part().to(self.device)
        aim_OI = (W_OI - lowrank_OI) / self._spread(self.scale_OG) + self._spread(zero_OG)
        code_OI = matrix.codes_OI.to(self.device).float()
        if not nearest:
            aim_OI = code_OI + (aim_OI - code_OI).clamp(-EDGE, EDGE)
        self.parameters["rounding"] = [aim_OI]
        self.zero_OG = zero_OG.clone()
        if matrix.zero_OG is not None:
            self.parameters["zeros"] = [self.zero_OG]
        if option.rank:
            L_OR, R_RI = (factor.to(self.device).float() for factor in (matrix.L_OR, matrix.R_RI))
            if matrix.L_scale_R is None:
                units = [factor.abs().amax(dim).clamp_min(SMALLEST) / ENTRY for factor, dim in ((L_OR, 0), (R_RI, 1))]
            else:
                units = [scale.to(self.device).float() for scale in (matrix.L_scale_R, matrix.R_scale_R)]
            self.unit_L_R, self.unit_R_R = units
            if matrix.L_scale_R is None:
                L_OR, R_RI = L_OR / self.unit_L_R, R_RI / self.unit_R_R[:, None]
            self.parameters["factors"] = [L_OR, R_RI]
        self.confine()

    def _spread(self, x_OG: Tensor) -> Tensor:
        """A value for each group as one for each input; unlike repeat_interleave its backward repeats on a GPU."""
        return x_OG[..., None].expand(-1, -1, self.size).flatten(1)[:, : self.matrix.columns]

    @torch.no_grad()
    def confine(self) -> None:
        """Bring parameters that a step took beyond their grid back to its border, where gradients still reach them."""
        self.parameters["rounding"][0].clamp_(-EDGE, self.top + EDGE)
        self.parameters["scales"][0].clamp_(0.25, 4.0)
        for zero_OG in self.parameters["zeros"]:
            zero_OG.clamp_(-EDGE, self.top + EDGE)

    def _scale(self) -> Tensor:
        scale_OG = self.scale_OG * self.parameters["scales"][0]
        return _through(scale_OG, scale_OG.detach().clamp(SMALLEST, LARGEST).half().float())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Entries of L and R as they are stored: int8, or float16 in units of the unit."""
        stored = []
        for free, unit in zip(self.parameters["factors"], (self.unit_L_R, self.unit_R_R[:, None]), strict=True):
            value = free.detach()
            if self.matrix.L_scale_R is None:
                stored.append(_through(free * unit, (value * unit).half().float()))
            else:
                stored.append(_through(free, value.round().clamp(-ENTRY, ENTRY)) * unit)
        return stored[0], stored[1]

    def weight(self) -> Tensor:
        """What_OI, float32: (code - zero) * scale + L R, all as stored."""
        (code_OI,) = self.parameters["rounding"]
        code_OI = _through(code_OI, code_OI.detach().round())
        zero_OG = _through(self.zero_OG, self.zero_OG.detach().round())
        W_OI = (code_OI - self._spread(zero_OG)) * self._spread(self._scale())
        if self.matrix.option.rank:
            L_OR, R_RI = self._factors()
            W_OI = W_OI + L_OR @ R_RI
        return W_OI

    @torch.no_grad()
    def compressed(self) -> CompressedMatrix:
        """The matrix as it is now, on the CPU, in the form and the bytes of the one it started from."""
        changed: dict[str, Tensor] = {
            "codes_OI": self.parameters["rounding"][0].round().to(torch.uint8),
            "scale_OG": self._scale().half(),
        }
        if self.matrix.zero_OG is not None:
            changed["zero_OG"] = self.zero_OG.round().to(torch.uint8)
        if self.matrix.option.rank:
            L_OR, R_RI = self.parameters["factors"]
            if self.matrix.L_scale_R is None:
                changed |= {"L_OR": (L_OR * self.unit_L_R).half(), "R_RI": (R_RI * self.unit_R_R[:, None]).half()}
            else:
                entries = {"L_OR": L_OR, "R_RI": R_RI}
                changed |= {name: x.round().clamp(-ENTRY, ENTRY).to(torch.int8) for name, x in entries.items()}
        return replace(self.matrix, **{name: tensor.cpu().contiguous() for name, tensor in changed.items()})
