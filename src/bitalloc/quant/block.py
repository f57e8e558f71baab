"""One group of columns: its scales, and its columns rounded one after another, each feeding the next.

On a CPU this is `bitalloc.quant.kernel`, on a GPU `bitalloc.quant.fused`. Plain torch is the fallback and the
second opinion in the tests of both; on a GPU it takes some 700 launches for a group. Every step is elementwise over
rows or done for one item of the stack at a time: the result of an item does not depend on what it is stacked with,
to the last bit.

Shapes: g columns of one group, I inputs, R rows of all stacked matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from bitalloc.quant.factor import Group, Order
from bitalloc.quant.grid import LARGEST, SHRINKS, SMALLEST, Grid, Stack

SLICE = 16


def columns(f_gR: Tensor, order: Order, stack: Stack, grid: Grid, group: Group, *, feed: bool = True) -> None:
    """Quantise the columns of `group`: the target in `grid.D_IR` becomes the residual, f is the feedback from before.

    Codes, scales, zeros, whitened errors and their sums go to `grid` too. Without `feed` every column is
    rounded by itself.
    """
    work = _compiled("kernel" if f_gR.device.type == "cpu" else "fused")
    work(f_gR, order, stack, grid, group, feed=feed)


@cache
def _compiled(name: str) -> Callable[..., None]:
    try:  # numba takes half a second to import; triton comes with torch where there is a GPU
        return import_module(f"bitalloc.quant.{name}").columns
    except ImportError as error:
        print(f"[sweep] no compiled kernel ({error}); plain torch is several times slower", file=sys.stderr, flush=True)
        return plain


def plain(f_gR: Tensor, order: Order, stack: Stack, grid: Grid, group: Group, *, feed: bool = True) -> None:
    """`columns` in plain torch."""
    a, b = group.start, group.stop
    M_gg = order.M_II[a:b, a:b] if feed else torch.eye(b - a, device=f_gR.device)
    x_gR, E_gR, diagonal_g = grid.D_IR[a:b], grid.E_IR[a:b], M_gg.diagonal()
    t_gR = x_gR + f_gR
    scale_R, zero_R = search(t_gR, stack, order.weight_I[a:b])
    # in units of the scale the zero is an integer shift: a step is round, clamp, subtract, feed forward
    y_gR, q_gR = _loop(t_gR.div_(scale_R), M_gg / diagonal_g, zero_R, stack)
    torch.mul(y_gR.sub_(q_gR).mul_(scale_R), diagonal_g[:, None], out=E_gR)
    x_gR -= q_gR * scale_R
    grid.codes_IR[a:b] = q_gR.add_(zero_R)
    grid.scale_GR[group.place], grid.zero_GR[group.place] = scale_R.half(), zero_R.to(torch.uint8)
    grid.error_R.add_(fold(E_gR.square()))


def _loop(t_gR: Tensor, N_gg: Tensor, zero_R: Tensor, stack: Stack) -> tuple[Tensor, Tensor]:
    """Targets with the feedback inside the group, and their nearest grid points, in units of the scale."""
    g, floor_R, ceiling_R = len(t_gR), -zero_R, stack.top_R - zero_R
    y_gR, q_gR, d_gR = t_gR.clone(), torch.empty_like(t_gR), torch.empty_like(t_gR)
    for start in range(0, g, SLICE):
        stop = min(start + SLICE, g)
        if start:
            add_product(y_gR[start:stop], N_gg[:start, start:stop].T, d_gR[:start], stack.rows)
        for j in range(start, stop):
            torch.round(y_gR[j], out=q_gR[j])
            torch.clamp(q_gR[j], floor_R, ceiling_R, out=q_gR[j])
            torch.sub(t_gR[j], q_gR[j], out=d_gR[j])
            if j + 1 < stop:
                y_gR[j + 1 : stop].addcmul_(N_gg[j, j + 1 : stop, None], d_gR[j])
    return y_gR, q_gR


def search(y_gR: Tensor, stack: Stack, weight_g: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row (float32 values that the stored types hold exactly) for one group of columns.

    Of 11 clipping ranges the one with the least squared error weighted by `weight_g` is taken, the wider of
    two equal ones. Scales are rounded to 16 bits before use.
    """
    top_R = stack.top_R
    lo_R, hi_R = y_gR.amin(0).clamp_(max=0), y_gR.amax(0).clamp_(min=0)
    if stack.symmetric:
        span_R, zero_R = 2 * torch.maximum(-lo_R, hi_R), (top_R + 1) / 2
    else:
        span_R = hi_R - lo_R
        zero_R = (-lo_R * top_R / span_R.clamp(min=SMALLEST)).round_()
    floor_R, ceiling_R = -zero_R, top_R - zero_R
    root_g1 = weight_g.sqrt()[:, None]
    t_gR, q_gR = torch.empty_like(y_gR), torch.empty_like(y_gR)
    best_R = scale_R = torch.empty(0)
    for shrink in SHRINKS:
        s_R = (span_R * (shrink / top_R)).clamp_(SMALLEST, LARGEST).half().float()
        torch.div(y_gR, s_R, out=t_gR)
        torch.round(t_gR, out=q_gR)
        torch.clamp(q_gR, floor_R, ceiling_R, out=q_gR)
        error_R = fold(q_gR.sub_(t_gR).mul_(root_g1).square_()) * s_R.square()
        if shrink == 1:
            best_R, scale_R = error_R, s_R
        else:
            better_R = error_R < best_R
            best_R, scale_R = torch.where(better_R, error_R, best_R), torch.where(better_R, s_R, scale_R)
    return scale_R, zero_R


def fold(x_gR: Tensor) -> Tensor:
    """Sum over the first axis, in place, by halves: `sum` may add in an order that depends on the stack."""
    n = len(x_gR)
    while n > 1:
        half = n // 2
        if n % 2:
            x_gR[0].add_(x_gR[n - 1])
        x_gR[:half].add_(x_gR[half : 2 * half])
        n = half
    return x_gR[0]


def add_product(out_gR: Tensor, A_gi: Tensor, B_iR: Tensor, rows: tuple[slice, ...]) -> None:
    """out += A B, one item at a time: the shape, hence the rounding, of a product must not depend on the stack."""
    for part in rows:
        out_gR[:, part].addmm_(A_gi, B_iR[:, part])
