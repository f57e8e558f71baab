"""GPTQ (Frantar et al. 2023), which is LDLQ (Chee et al. 2023): round column by column, feeding errors forward.

Rows are independent given the moments, so whole options are stacked and share one loop over the columns.
The loop looks left: the feedback of everything before a group comes as one product when the group is
reached, that of 16-column slices within the group likewise, and only within a slice column by column.

Shapes: I inputs, K options stacked, O outputs (rows), g columns of a group, G groups, R = K O.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitalloc.quant.factor import Order
from bitalloc.quant.grid import Grid, add_product, search

SLICE = 16


def gptq(X_IKO: Tensor, bits_K: Tensor, order: Order, *, symmetric: bool) -> Grid:
    """Quantise stacked matrices (columns first, in `order`); X is overwritten with the residual."""
    M_II = order.M_II
    top_K = (2.0**bits_K - 1).to(X_IKO.dtype)
    codes_IKO = torch.empty_like(X_IKO, dtype=torch.uint8)
    E_IKO = torch.empty_like(X_IKO)
    scales, zeros = [], []
    for group in order.groups:
        a, b = group.start, group.stop
        M_gg = M_II[a:b, a:b]
        x_gKO = X_IKO[a:b].clone()
        if a:
            # where the group should move to make up for all errors so far; its scales must see that
            P_ag = torch.linalg.solve_triangular(M_gg, M_II[:a, a:b], upper=True, left=False)
            add_product(x_gKO, P_ag.T, X_IKO[:a])
        scale, zero = search(x_gKO, top_K, order.weight_I[a:b], symmetric=symmetric)
        y_gKO, q_gKO = _columns(x_gKO.div_(scale), M_gg / M_gg.diagonal(), -zero, top_K[:, None] - zero)
        torch.mul(y_gKO.sub_(q_gKO).mul_(scale), M_gg.diagonal()[:, None, None], out=E_IKO[a:b])
        X_IKO[a:b] -= q_gKO * scale
        codes_IKO[a:b] = q_gKO.add_(zero)
        scales.append(scale.half())
        zeros.append(zero.to(torch.uint8))
    return Grid(codes_IKO, torch.stack(scales), None if symmetric else torch.stack(zeros), X_IKO, E_IKO)


def _columns(x_gKO: Tensor, N_gg: Tensor, floor_KO: Tensor, ceiling_KO: Tensor) -> tuple[Tensor, Tensor]:
    """Weights with the feedback inside the group, and their nearest grid points, both in units of the scale.

    `N_gg` is M with its columns divided by the diagonal. In units of the scale the zero is an integer
    shift, so a step is: round, clamp, subtract, feed forward.
    """
    g = len(x_gKO)
    y_gKO, q_gKO, d_gKO = x_gKO.clone(), torch.empty_like(x_gKO), torch.empty_like(x_gKO)
    y_gR, floor_R, ceiling_R = y_gKO.view(g, -1), floor_KO.reshape(-1), ceiling_KO.reshape(-1)
    columns = list(zip(*(t.view(g, -1).unbind() for t in (x_gKO, y_gKO, q_gKO, d_gKO)), strict=True))
    for start in range(0, g, SLICE):
        stop = min(start + SLICE, g)
        if start:
            add_product(y_gKO[start:stop], N_gg[:start, start:stop].T, d_gKO[:start])
        for j in range(start, stop):
            x_R, y_R, q_R, d_R = columns[j]
            torch.round(y_R, out=q_R)
            torch.clamp(q_R, floor_R, ceiling_R, out=q_R)
            torch.sub(x_R, q_R, out=d_R)
            if j + 1 < stop:
                y_gR[j + 1 : stop].addcmul_(N_gg[j, j + 1 : stop, None], d_R)
    return y_gKO, q_gKO
