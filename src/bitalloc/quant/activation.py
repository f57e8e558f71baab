"""Activations in few bits, simulated: rounded to the grid of an integer type, and back.

The grid is that of torchao and compressed-tensors, so that a simulation can be held against them: codes from -2^(b-1)
to 2^(b-1) - 1, symmetric scale max|x| / ((2^b - 1) / 2). The largest positive value is thus clipped by half a step.

Shapes: T tokens, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLIPS = tuple(1 - step / 20 for step in range(11))  # 1 .. 0.5
TINY = torch.finfo(torch.float32).eps  # the smallest scale, as in torchao


def span(bits: int) -> tuple[int, int]:
    """Least and largest code.

    >>> span(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def rounded(x: Tensor, scale: Tensor, bits: int, zero: Tensor | float = 0.0) -> Tensor:
    """(clamp(round(x / s) + z) - z) s, float32.

    >>> rounded(torch.tensor([7.4, -9.0, 0.4]), torch.tensor(1.0), 4).tolist()
    [7.0, -8.0, 0.0]
    """
    low, high = span(bits)
    return ((x / scale).round().add(zero).clamp(low, high) - zero) * scale


def symmetric_scale(largest: Tensor, bits: int) -> Tensor:
    """The scale that maps -`largest` to the ends of the codes.

    >>> symmetric_scale(torch.tensor(15.0), 4).item()
    2.0
    """
    return (largest / ((2**bits - 1) / 2)).clamp(min=TINY)


@dataclass(frozen=True)
class Dynamic:
    """A scale for each token, from the token itself; `symmetric` False: with a zero point, as torchao's W4A8.

    The scale covers the share `clip` of the token's range; what is beyond is clipped.
    """

    bits: int
    symmetric: bool = True
    clip: float = 1.0

    def __call__(self, x_TI: Tensor) -> Tensor:
        x = x_TI.float()
        if self.symmetric:
            largest = x.abs().amax(-1, keepdim=True) * self.clip
            return rounded(x, symmetric_scale(largest, self.bits), self.bits).to(x_TI.dtype)
        low, high = span(self.bits)
        least, most = (ends * self.clip for ends in (x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)))
        scale = ((most - least) / (high - low)).clamp(min=TINY)
        zero = (low - (least / scale).round()).clamp(low, high)
        return rounded(x, scale, self.bits, zero).to(x_TI.dtype)


@dataclass(frozen=True)
class Static:
    """One scale for the tensor, calibrated: beyond `largest` is clipped."""

    bits: int
    largest: Tensor

    def __call__(self, x_TI: Tensor) -> Tensor:
        return rounded(x_TI.float(), symmetric_scale(self.largest, self.bits), self.bits).to(x_TI.dtype)


@dataclass(frozen=True)
class Float:
    """A 16-bit float and back."""

    dtype: torch.dtype

    def __call__(self, x_TI: Tensor) -> Tensor:
        return x_TI.to(self.dtype).to(x_TI.dtype)


Activation = Dynamic | Static | Float


def clipped(x_TI: Tensor, bits: int, *, symmetric: bool) -> Dynamic:
    """The rounding of least squared error on these tokens: the share of their range that it covers is searched.

    >>> outlier = torch.cat([torch.linspace(-1, 1, 255), torch.tensor([3.0])])[None]
    >>> clipped(outlier, 4, symmetric=True).clip < clipped(outlier[:, :-1], 4, symmetric=True).clip
    True
    """
    offered = [Dynamic(bits, symmetric, clip) for clip in CLIPS]
    return min(offered, key=lambda each: float((each(x_TI) - x_TI).square().sum()))


def percentile(x_TI: Tensor, percent: float) -> Tensor:
    """The `percent` percentile of |x|, linear between order statistics.

    >>> percentile(torch.tensor([[1.0, -2.0], [3.0, -5.0]]), 100).item()
    5.0
    """
    ordered = x_TI.abs().flatten().sort().values
    place = percent / 100 * (len(ordered) - 1)  # torch.quantile refuses more than 2^24 values
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)
