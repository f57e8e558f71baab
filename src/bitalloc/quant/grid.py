"""Affine grids: What = (code - zero) * scale for each group of a row, the scale a 16-bit float.

Shapes: I inputs, G groups, R rows of all stacked matrices. Inputs come first, so that a step of the column
loop touches contiguous memory, and they are in the order of processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bitalloc.quant.factor import Order

SHRINKS = tuple(1 - step / 20 for step in range(11))  # 1.0 .. 0.5: clipping outliers buys resolution
SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive float16


@dataclass(frozen=True)
class Stack:
    """Rows of several matrices (or of one at several options) that go through one column loop."""

    rows: tuple[slice, ...]  # of each item
    top_R: Tensor  # largest code of a row, 2^bits - 1, float32
    symmetric: bool

    @classmethod
    def of(cls, rows: Sequence[int], bits: Sequence[int], *, symmetric: bool, device: torch.device) -> Stack:
        """Items of `rows` rows and `bits` bits each, one after another."""
        edges = [sum(rows[:k]) for k in range(len(rows) + 1)]
        top_R = torch.cat([torch.full((n,), 2.0**b - 1, device=device) for n, b in zip(rows, bits, strict=True)])
        return cls(tuple(slice(a, b) for a, b in pairwise(edges)), top_R, symmetric)


@dataclass(frozen=True)
class Grid:
    """What a quantiser returns."""

    codes_IR: Tensor  # uint8
    scale_GR: Tensor  # float16
    zero_GR: Tensor  # uint8; 2^(bits-1) when symmetric
    D_IR: Tensor  # X - What, float32
    E_IR: Tensor  # the same whitened, D M
    error_R: Tensor  # float64: row sums of E^2, the calibrated error (damped)

    @classmethod
    def empty(cls, X_IR: Tensor, order: Order) -> Grid:
        """A grid to be filled; X_IR becomes its residual."""
        groups, rows = len(order.groups), X_IR.shape[1]
        return cls(
            codes_IR=torch.empty_like(X_IR, dtype=torch.uint8),
            scale_GR=X_IR.new_empty(groups, rows, dtype=torch.float16),
            zero_GR=X_IR.new_empty(groups, rows, dtype=torch.uint8),
            D_IR=X_IR,
            E_IR=torch.empty_like(X_IR),
            error_R=X_IR.new_zeros(rows, dtype=torch.float64),
        )

    def error(self, rows: slice) -> float:
        """||E||_F^2 of one item."""
        return float(self.error_R[rows].sum())
