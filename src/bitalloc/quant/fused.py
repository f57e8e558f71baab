"""The scale search and the column loop of one group in Triton, for a GPU: some 20 launches where torch takes 700.

The same arithmetic as in `bitalloc.quant.block`. A program holds a panel of rows in registers: all columns of a
group for the search, 16 columns for the loop; what earlier slices of the group feed to a slice is a product.
Every row goes through the same instructions whatever panel it is in, so results do not depend on the stack.

Shapes: g columns of one group, s columns of a slice, R rows of all stacked matrices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitalloc.quant.block import SLICE, add_product, fold
from bitalloc.quant.factor import Group, Order
from bitalloc.quant.grid import LARGEST, SHRINKS, SMALLEST, Grid, Stack

_STEPS, _SMALLEST, _LARGEST = tl.constexpr(len(SHRINKS)), tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
_ROUND = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it rounds to the nearest integer, ties to even
PANEL = 4096  # values that a program of the search holds


@triton.jit
def _search(T, weight, top, scale, zero, rows, g, symmetric: tl.constexpr, G: tl.constexpr, LANES: tl.constexpr):  # noqa: PLR0917 - pointers, for triton
    lane, j = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.arange(0, G)
    inside = lane < rows
    t = tl.load(T + j[:, None] * rows + lane[None, :], mask=(j < g)[:, None] & inside[None, :], other=0.0)
    w = tl.load(weight + j, mask=j < g, other=0.0)[:, None]
    largest = tl.load(top + lane, mask=inside, other=1.0)
    lo, hi = tl.minimum(tl.min(t, 0), 0.0), tl.maximum(tl.max(t, 0), 0.0)
    if symmetric:
        span = 2.0 * tl.maximum(-lo, hi)
        z = (largest + 1.0) * 0.5
    else:
        span = hi - lo
        z = (-lo * largest / tl.maximum(span, _SMALLEST) + _ROUND) - _ROUND
    s, best = span, span
    for step in tl.static_range(_STEPS):
        trial = tl.minimum(tl.maximum(span * ((1.0 - step / 20.0) / largest), _SMALLEST), _LARGEST)
        trial = trial.to(tl.float16).to(tl.float32)
        x = t / trial[None, :]
        q = tl.minimum(tl.maximum(x, -z[None, :]), (largest - z)[None, :])
        e = ((q + _ROUND) - _ROUND) - x
        error = tl.sum(e * e * w, 0) * trial * trial
        if step == 0:
            s, best = trial, error
        else:
            s, best = tl.where(error < best, trial, s), tl.minimum(error, best)
    tl.store(scale + lane, s, mask=inside)
    tl.store(zero + lane, z, mask=inside)


@triton.jit
def _slice(Y, T, N, zero, top, Q, D, rows, g, s, SLICE_: tl.constexpr, LANES: tl.constexpr):  # noqa: PLR0917 - pointers, for triton
    lane, i = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.arange(0, SLICE_)
    inside = lane < rows
    places, there = i[:, None] * rows + lane[None, :], (i < s)[:, None] & inside[None, :]
    y = tl.load(Y + places, mask=there, other=0.0)
    z = tl.load(zero + lane, mask=inside, other=0.0)
    ceiling = tl.load(top + lane, mask=inside, other=1.0) - z
    for j in tl.static_range(SLICE_):
        own = tl.sum(tl.where((i == j)[:, None], y, 0.0), 0)
        q = (tl.minimum(tl.maximum(own, -z), ceiling) + _ROUND) - _ROUND
        here = inside & (lane * 0 + j < s)
        d = tl.load(T + j * rows + lane, mask=here, other=0.0) - q
        feed = tl.load(N + j * g + i, mask=(i > j) & (i < s), other=0.0)
        y += feed[:, None] * d[None, :]
        tl.store(Q + j * rows + lane, q, mask=here)
        tl.store(D + j * rows + lane, d, mask=here)
    tl.store(Y + places, y, mask=there)


def columns(f_gR: Tensor, order: Order, stack: Stack, grid: Grid, group: Group, *, feed: bool = True) -> None:
    """See `bitalloc.quant.block.columns`; float32, rows contiguous."""
    a, b = group.start, group.stop
    g, rows = f_gR.shape
    M_gg = order.M_II[a:b, a:b] if feed else torch.eye(g, device=f_gR.device)
    x_gR, E_gR, diagonal_g = grid.D_IR[a:b], grid.E_IR[a:b], M_gg.diagonal()
    t_gR = x_gR + f_gR
    scale_R, zero_R = torch.empty_like(stack.top_R), torch.empty_like(stack.top_R)
    wide = triton.next_power_of_2(g)
    lanes = max(PANEL // wide, 1)
    settings = {"symmetric": stack.symmetric, "G": wide, "LANES": lanes}
    weight_g = order.weight_I[a:b].contiguous()
    _search[(triton.cdiv(rows, lanes),)](t_gR, weight_g, stack.top_R, scale_R, zero_R, rows, g, **settings)
    t_gR /= scale_R
    N_gg = (M_gg / diagonal_g).contiguous()
    y_gR, q_gR, d_gR = t_gR.clone(), torch.empty_like(t_gR), torch.empty_like(t_gR)
    for start in range(0, g, SLICE):
        stop = min(start + SLICE, g)
        at = slice(start, stop)
        if start:
            add_product(y_gR[at], N_gg[:start, at].T, d_gR[:start], stack.rows)
        inputs = (y_gR[at], t_gR[at], N_gg[at, at], zero_R, stack.top_R)
        sizes = (rows, g, stop - start)
        _slice[(triton.cdiv(rows, 128),)](*inputs, q_gR[at], d_gR[at], *sizes, SLICE_=SLICE, LANES=128)
    torch.mul(y_gR.sub_(q_gR).mul_(scale_R), diagonal_g[:, None], out=E_gR)
    x_gR -= q_gR * scale_R
    grid.codes_IR[a:b] = q_gR.add_(zero_R)
    grid.scale_GR[group.place], grid.zero_GR[group.place] = scale_R.half(), zero_R.to(torch.uint8)
    grid.error_R.add_(fold(E_gR.square()))
