"""A compressed matrix that takes gradients: codes, scales, zeros and factors, each through its stored precision; and
the descent that learns them.

What is learned stays on the grid of the option, so that bytes, format and every exporter are those of the matrix it
started from. Rounding is straight-through: forward the stored value, backward the identity (Bengio et al. 2013).

Shapes: O outputs, I inputs, G groups, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitalloc.quant import CompressedMatrix
from bitalloc.quant.grid import LARGEST, SMALLEST

PARTS = ("rounding", "scales", "zeros", "factors")
EDGE = 0.49  # of the cell of a code
ENTRY = 127.0  # largest entry of an 8-bit factor; 16-bit factors step by this share of their column's largest
LOOKS = 10  # times that a descent looks at the windows held out
# what a step of rate 1 moves: codes, shares of a scale, zero points, entries of a factor (of 127)
UNITS = {
    "sign": {"rounding": 1.0, "scales": 1.0, "zeros": 4.0, "factors": 40.0},
    "adam": {"rounding": 1.0, "scales": 1.0, "zeros": 4.0, "factors": 100.0},
}


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


def descend(
    learned: Mapping[str, Learned],
    parts: Sequence[str],
    *,
    loss: Callable[[Sequence[int]], Tensor | None],
    held: Callable[[], float],
    train: Sequence[int],
    steps: int,
    rate: float | None,
    batch: int,
    optimizer: str,
    seed: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> tuple[int, float]:
    """Learn these parts of the matrices in `steps` steps: the step of the best iterate, which is left, and its loss.

    The rate falls linearly to 0; it is 1 / steps if None, by which a code travels half a unit in all. `loss` takes
    windows of `train`, all of which come before any comes again, and returns what is to be descended, or has called
    backward itself; `held` is the loss on windows that are not in `train`, told at the start and ten times. sign:
    x -= rate unit sign(gradient) (Cheng et al. 2023), adam: torch's at rate x unit; the units are `UNITS`.
    """
    groups = [
        {"params": matrix.parameters[part], "unit": UNITS[optimizer][part]}
        for matrix in learned.values()
        for part in parts
    ]
    groups = [group for group in groups if group["params"]]
    parameters = [parameter.requires_grad_() for group in groups for parameter in group["params"]]
    draws, rate = _draws(train, batch, seed), rate or 1 / max(1, steps)
    adam = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.99)) if optimizer == "adam" and groups else None
    best, least, kept = 0, held(), [parameter.detach().clone() for parameter in parameters]
    for step in range(steps):
        value = loss(next(draws)) if groups else None
        if value is not None:
            value.backward()
        now = rate * (1 - step / steps)
        if adam:
            for group in adam.param_groups:
                group["lr"] = now * group["unit"]
            adam.step()
        with torch.no_grad():
            for group in groups:
                for parameter in group["params"]:
                    if not adam:
                        parameter.sub_(parameter.grad.sign(), alpha=now * group["unit"])
                    parameter.grad = None
        for matrix in learned.values():
            matrix.confine()
        advance()
        if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
            found = held()
            if found < least:
                best, least, kept = step + 1, found, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    return best, least


def _draws(train: Sequence[int], batch: int, seed: Sequence[int]) -> Iterator[list[int]]:
    """
    >>> draws = _draws(range(4), 3, [0])
    >>> sorted(next(draws) + next(draws)[:1])
    [0, 1, 2, 3]
    """
    draw, coming = np.random.default_rng(list(seed)), list[int]()
    while True:
        while len(coming) < batch:
            coming += draw.permutation(train).tolist()
        yield coming[:batch]
        coming = coming[batch:]
