"""The scale search and the column loop of one group, compiled for the CPU.

The same arithmetic as in `bitalloc.quant.block`, which is its second opinion: a panel of rows stays in the
cache from the search to the last column, where torch goes through memory at every step. Numba keeps the
machine code beside this file (or in its own cache folder), so compilation is paid once a machine. Every row
goes through the same instructions whatever panel it is in, so results do not depend on the stack.

Shapes: g columns of one group, I inputs, G groups, R rows of all stacked matrices.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bitalloc.quant.factor import Group, Order
from bitalloc.quant.grid import LARGEST, SHRINKS, SMALLEST, Grid, Stack

LANES = 128  # a panel of 128 columns stays in the second-level cache
ROUND = np.float32(1.5 * 2**23)  # added and taken away, it rounds to the nearest integer, ties to even
_SHRINKS = np.array(SHRINKS, dtype=np.float32)
_SMALLEST, _LARGEST = np.float32(SMALLEST), np.float32(LARGEST)
_ONE, _TWO, _ZERO, _HALF = (np.float32(value) for value in (1, 2, 0, 0.5))
_NORMAL = np.float32(2.0**-14)  # smallest normal float16


@njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _panels(first, last, X, F, N, diagonal, root, top, symmetric, codes, E, scale, zero, error):  # noqa: PLR0917 - plain arrays, for numba
    g, rows = X.shape
    w, d = np.empty((len(N), LANES), np.float32), np.empty((len(N), LANES), np.float32)
    lo, hi, t = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    z, floor, ceiling = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    trial, inverse, sum_ = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    s, best, span = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    y, sum_e = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    whole = trial.view(np.int32)
    for panel in range(first, last):
        at = panel * LANES
        n = min(LANES, rows - at)
        for r in range(LANES):
            lo[r], hi[r], t[r] = _ZERO, _ZERO, _ONE
        for r in range(n):
            t[r] = top[at + r]
        for j in range(g):
            for r in range(n):
                w[j, r] = X[j, at + r] + F[j, at + r]
            for r in range(n, LANES):
                w[j, r] = _ZERO
            for r in range(LANES):
                lo[r] = w[j, r] if w[j, r] < lo[r] else lo[r]
                hi[r] = w[j, r] if w[j, r] > hi[r] else hi[r]
        for r in range(LANES):
            if symmetric:
                span[r] = _TWO * (hi[r] if hi[r] > -lo[r] else -lo[r])
                z[r] = (t[r] + _ONE) * _HALF
            else:
                span[r] = hi[r] - lo[r]
                z[r] = -lo[r] * t[r] / (span[r] if span[r] > _SMALLEST else _SMALLEST)
                z[r] = (z[r] + ROUND) - ROUND
            floor[r], ceiling[r] = -z[r], t[r] - z[r]
        for step in range(len(_SHRINKS)):
            for r in range(LANES):
                x = span[r] * (_SHRINKS[step] / t[r])
                x = x if x > _SMALLEST else _SMALLEST
                trial[r] = x if x < _LARGEST else _LARGEST
            for r in range(LANES):  # to float16 and back: ten bits of mantissa, ties to even
                subnormal = (trial[r] + _HALF) - _HALF
                small = trial[r] < _NORMAL
                whole[r] = (whole[r] + np.int32(0xFFF) + ((whole[r] >> 13) & np.int32(1))) & ~np.int32(0x1FFF)
                trial[r] = subnormal if small else trial[r]
            for r in range(LANES):
                trial[r] = trial[r] if trial[r] < _LARGEST else _LARGEST
                inverse[r] = _ONE / trial[r]
                sum_[r] = _ZERO
            for j in range(g):
                weight = root[j]
                for r in range(LANES):
                    x = w[j, r] * inverse[r]
                    q = x if x > floor[r] else floor[r]
                    q = q if q < ceiling[r] else ceiling[r]
                    e = (((q + ROUND) - ROUND) - x) * weight
                    sum_[r] += e * e
            for r in range(LANES):
                e = sum_[r] * (trial[r] * trial[r])
                better = step == 0 or e < best[r]
                best[r] = e if better else best[r]
                s[r] = trial[r] if better else s[r]
        for r in range(LANES):
            inverse[r] = _ONE / s[r]
            sum_e[r] = _ZERO
        for i in range(g):
            if i % 4 == 0:  # what came before, for four columns and from four at a time: from registers
                for j in range(0, i, 4):
                    a0, a1, a2, a3 = N[i, j], N[i, j + 1], N[i, j + 2], N[i, j + 3]
                    b0, b1, b2, b3 = N[i + 1, j], N[i + 1, j + 1], N[i + 1, j + 2], N[i + 1, j + 3]
                    c0, c1, c2, c3 = N[i + 2, j], N[i + 2, j + 1], N[i + 2, j + 2], N[i + 2, j + 3]
                    e0, e1, e2, e3 = N[i + 3, j], N[i + 3, j + 1], N[i + 3, j + 2], N[i + 3, j + 3]
                    for r in range(LANES):
                        d0, d1, d2, d3 = d[j, r], d[j + 1, r], d[j + 2, r], d[j + 3, r]
                        w[i, r] += a0 * d0 + a1 * d1 + a2 * d2 + a3 * d3
                        w[i + 1, r] += b0 * d0 + b1 * d1 + b2 * d2 + b3 * d3
                        w[i + 2, r] += c0 * d0 + c1 * d1 + c2 * d2 + c3 * d3
                        w[i + 3, r] += e0 * d0 + e1 * d1 + e2 * d2 + e3 * d3
            for r in range(LANES):
                y[r] = w[i, r]
            for j in range(i - i % 4, i):
                n0 = N[i, j]
                for r in range(LANES):
                    y[r] += n0 * d[j, r]
            m = diagonal[i]
            for r in range(LANES):
                q = y[r] * inverse[r]
                q = q if q > floor[r] else floor[r]
                q = q if q < ceiling[r] else ceiling[r]
                t[r] = (q + ROUND) - ROUND
                y[r] = (y[r] - t[r] * s[r]) * m
                sum_e[r] += y[r] * y[r]
            for r in range(n):
                x = X[i, at + r] - t[r] * s[r]
                d[i, r] = x + F[i, at + r]
                X[i, at + r] = x
                E[i, at + r] = y[r]
                codes[i, at + r] = np.uint8(t[r] + z[r])
            for r in range(n, LANES):
                d[i, r] = _ZERO
        for r in range(n):
            scale[at + r] = s[r]
            zero[at + r] = np.uint8(z[r])
            error[at + r] += sum_e[r]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


def columns(f_gR: Tensor, order: Order, stack: Stack, grid: Grid, group: Group, *, feed: bool = True) -> None:
    """See `bitalloc.quant.block.columns`; float32 on the CPU, rows contiguous."""
    a, b = group.start, group.stop
    M_gg = order.M_II[a:b, a:b] if feed else torch.eye(b - a)
    # N[i, j] is what column j feeds to column i; whole blocks of four, the rest is zero
    N = torch.nn.functional.pad((M_gg / M_gg.diagonal()).T, (0, -len(M_gg) % 4, 0, -len(M_gg) % 4)).contiguous()
    scale_R = torch.empty_like(stack.top_R)
    inputs = (grid.D_IR[a:b], f_gR, N, M_gg.diagonal().contiguous(), order.weight_I[a:b].sqrt(), stack.top_R)
    outputs = (grid.codes_IR[a:b], grid.E_IR[a:b], scale_R, grid.zero_GR[group.place], grid.error_R)
    arrays = [tensor.numpy() for tensor in (*inputs, *outputs)]
    arrays.insert(len(inputs), stack.symmetric)
    panels = -(-f_gR.shape[1] // LANES)
    threads = min(torch.get_num_threads(), panels)
    edges = [panels * k // threads for k in range(threads + 1)]
    if threads == 1:
        _panels(0, panels, *arrays)
    else:
        list(_pool(threads).map(lambda k: _panels(edges[k], edges[k + 1], *arrays), range(threads)))
    grid.scale_GR[group.place] = scale_R.half()
