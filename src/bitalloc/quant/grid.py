"""Affine grids: What = (code - zero) * scale for each group of a row, the scale a 16-bit float.

Shapes: g columns of one group, I inputs, G groups, K options stacked, O outputs (rows). Columns come
first, so that the column loop touches contiguous memory. Every operation is elementwise or done for one
option at a time: an option's result does not depend on what it is stacked with, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS = tuple(1 - step / 20 for step in range(11))  # 1.0 .. 0.5: clipping outliers buys resolution
SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive float16


@dataclass(frozen=True)
class Grid:
    """What a quantiser returns, all in the order of processing."""

    codes_IKO: Tensor  # uint8
    scale_GKO: Tensor  # float16
    zero_GKO: Tensor | None  # uint8; None when symmetric: the zero is then 2^(bits-1)
    D_IKO: Tensor  # X - What, float32
    E_IKO: Tensor  # the same whitened, D M: its squared norm is the calibrated error


def search(x_gKO: Tensor, top_K: Tensor, weight_g: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero [K, O] (float32 values that the stored types hold exactly) of one group of columns.

    `top_K` is the largest code, 2^bits - 1. Of 11 clipping ranges the one with the least squared error
    weighted by `weight_g` is taken, the wider of two equal ones. Scales are rounded to 16 bits before use.
    """
    top_KO = top_K[:, None]
    lo, hi = x_gKO.amin(0).clamp_(max=0), x_gKO.amax(0).clamp_(min=0)
    if symmetric:
        span = 2 * torch.maximum(-lo, hi)
        zero = ((top_KO + 1) / 2).expand_as(span).contiguous()
    else:
        span = hi - lo
        zero = (-lo * top_KO / span.clamp(min=SMALLEST)).round_()
    floor, ceiling = -zero, top_KO - zero
    root_g11 = weight_g.sqrt()[:, None, None]
    t, q = torch.empty_like(x_gKO), torch.empty_like(x_gKO)
    best = scale = torch.empty(0)
    for shrink in SHRINKS:
        s = (span * (shrink / top_KO)).clamp_(SMALLEST, LARGEST).half().float()
        torch.div(x_gKO, s, out=t)
        torch.round(t, out=q)
        torch.clamp(q, floor, ceiling, out=q)
        error = _fold(q.sub_(t).mul_(root_g11).square_()) * s.square()
        if shrink == 1:
            best, scale = error, s
        else:
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, s, scale)
    return scale, zero


def _fold(x_gKO: Tensor) -> Tensor:
    """Sum over the first axis, in place, by halves: `sum` may add in an order that depends on the stack."""
    n = len(x_gKO)
    while n > 1:
        half = n // 2
        if n % 2:
            x_gKO[0].add_(x_gKO[n - 1])
        x_gKO[:half].add_(x_gKO[half : 2 * half])
        n = half
    return x_gKO[0]


def add_product(out_gKO: Tensor, A_gi: Tensor, B_iKO: Tensor) -> None:
    """out += A B, one option at a time: the shape, hence the rounding, of a product must not depend on K."""
    for k in range(out_gKO.shape[1]):
        out_gKO[:, k].addmm_(A_gi, B_iKO[:, k])
