"""Round to nearest: every weight by itself, the scales chosen for the inputs that matter.

Shapes: I inputs, K options stacked, O outputs (rows), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitalloc.quant.factor import Order
from bitalloc.quant.grid import Grid, add_product, search


def rtn(X_IKO: Tensor, bits_K: Tensor, order: Order, *, symmetric: bool) -> Grid:
    """Quantise stacked matrices (columns first, in `order`); X is overwritten with the residual."""
    top_K = (2.0**bits_K - 1).to(X_IKO.dtype)
    codes_IKO = torch.empty_like(X_IKO, dtype=torch.uint8)
    scales, zeros = [], []
    for group in order.groups:
        x_gKO = X_IKO[group.start : group.stop]
        scale, zero = search(x_gKO, top_K, order.weight_I[group.start : group.stop], symmetric=symmetric)
        q = torch.clamp((x_gKO / scale).round_(), -zero, top_K[:, None] - zero)
        codes_IKO[group.start : group.stop] = q + zero
        x_gKO -= q * scale
        scales.append(scale.half())
        zeros.append(zero.to(torch.uint8))
    E_IKO = torch.zeros_like(X_IKO)
    add_product(E_IKO, order.M_II.T, X_IKO)
    return Grid(codes_IKO, torch.stack(scales), None if symmetric else torch.stack(zeros), X_IKO, E_IKO)
