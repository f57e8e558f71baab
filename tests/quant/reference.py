"""GPTQ and low rank as the papers write them: float64, one option and one column at a time, nothing shared."""

from __future__ import annotations

import torch
from torch import Tensor

from bitalloc.option import Option


def moments(columns: int, *, seed: int = 0, outliers: int = 0) -> Tensor:
    """H_II of correlated inputs with decaying energy, a few of them outliers."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5
    X = torch.randn(4 * columns, columns, generator=draw) * torch.linspace(2, 0.1, columns) @ (mix + torch.eye(columns))
    X[:, torch.randperm(columns, generator=draw)[:outliers]] *= 20
    return X.T @ X / len(X)


def weights(rows: int, columns: int, *, seed: int = 0, outliers: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(rows, columns, generator=draw) * 0.05
    W_OI.view(-1)[torch.randperm(W_OI.numel(), generator=draw)[:outliers]] *= 12
    return W_OI


def scale_and_zero(w_Og: Tensor, bits: int, weight_g: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    top, best = 2**bits - 1, None
    lo, hi = w_Og.amin(1).clamp(max=0), w_Og.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-lo, hi) if symmetric else hi - lo
    zero = torch.full_like(lo, (top + 1) / 2) if symmetric else (-lo * top / span).round()
    for step in range(11):
        scale = (span * (1 - step / 20) / top).half().double()
        codes = (w_Og / scale[:, None] + zero[:, None]).round().clamp(0, top)
        error = (((codes - zero[:, None]) * scale[:, None] - w_Og) ** 2 * weight_g).sum(1)
        best = (
            (error, scale)
            if best is None
            else tuple(torch.where(error < best[0], *p) for p in [(error, best[0]), (scale, best[1])])
        )
    return best[1], zero


def gptq(W_OI: Tensor, H_II: Tensor, bits: int, groups: list[list[int]], symmetric: bool = False) -> Tensor:
    """What_OI. The classic form: Cholesky of the inverse, every later column updated at once."""
    order = [column for group in groups for column in group]
    W_OI, H_II = W_OI[:, order].clone(), H_II[order][:, order]
    U_II = torch.linalg.cholesky(torch.linalg.inv(H_II), upper=True)
    Q_OI, start = torch.empty_like(W_OI), 0
    for group in groups:
        stop = start + len(group)
        scale, zero = scale_and_zero(W_OI[:, start:stop], bits, H_II.diagonal()[start:stop], symmetric)
        for j in range(start, stop):
            code = (W_OI[:, j] / scale + zero).round().clamp(0, 2**bits - 1)
            Q_OI[:, j] = (code - zero) * scale
            W_OI[:, j:] -= torch.outer((W_OI[:, j] - Q_OI[:, j]) / U_II[j, j], U_II[j, j:])
        start = stop
    back = torch.empty_like(Q_OI)
    back[:, order] = Q_OI
    return back


def grouped(H_II: Tensor, size: int, act_order: bool) -> list[list[int]]:
    """Columns of every group in the order of processing."""
    energy = H_II.diagonal().double().tolist()
    groups = [list(range(at, min(at + size, len(energy)))) for at in range(0, len(energy), size)]
    if not act_order:
        return groups
    groups.sort(key=lambda group: -sum(energy[i] for i in group))
    return [sorted(group, key=lambda i: -energy[i]) for group in groups]


def rounded(X: Tensor, dim: int) -> Tensor:
    scale = (X.abs().amax(dim, keepdim=True) / 127).half().double()
    return (X / scale).round().clamp(-127, 127) * scale


def lowrank(T_OI: Tensor, M_II: Tensor, rank: int) -> Tensor:
    """The best rank-R part of T in the norm of M, its factors balanced and rounded to 8 bits."""
    U, S, V = torch.linalg.svd(T_OI @ M_II, full_matrices=False)
    L_OR = U[:, :rank]
    R_RI = S[:rank, None] * V[:rank] @ torch.linalg.inv(M_II)
    ratio = (R_RI.abs().amax(1) / L_OR.abs().amax(0)).sqrt()
    return rounded(L_OR * ratio, 0) @ rounded(R_RI / ratio[:, None], 1)


def compress(W_OI: Tensor, H_II: Tensor, option: Option, *, damping: float, act_order: bool, iterations: int) -> Tensor:
    """What_OI under `option`: low rank first, then rounds; the best pair by the damped calibrated error."""
    groups = grouped(H_II, option.group_size, act_order)
    W_OI, H_II = W_OI.double(), H_II.double()
    H_II = H_II + damping * H_II.diagonal().mean() * torch.eye(len(H_II))
    M_II = torch.linalg.cholesky(H_II)

    def quantised(target: Tensor) -> Tensor:
        return gptq(target, H_II, option.bits, groups, option.symmetric)

    if not option.rank:
        return quantised(W_OI)
    LR, candidates = lowrank(W_OI, M_II, option.rank), []
    if iterations:
        Q = quantised(W_OI)
        candidates.append(Q + lowrank(W_OI - Q, M_II, option.rank))
    for _ in range(max(1, iterations)):
        Q = quantised(W_OI - LR)
        candidates.append(Q + LR)
        if iterations:
            LR = lowrank(W_OI - Q, M_II, option.rank)
            candidates.append(Q + LR)
    return min(candidates, key=lambda What: float(((W_OI - What) @ M_II).square().sum()))


def rel_error(W_OI: Tensor, What_OI: Tensor, H_II: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), undamped, float64."""
    W_OI, H_II = W_OI.double(), H_II.double()
    E_OI = W_OI - What_OI.double()
    return float(((E_OI @ H_II) * E_OI).sum() / ((W_OI @ H_II) * W_OI).sum())
