"""What `bench_sweep.py` compares with: GPTQ and the whitened SVD as they are usually written, one option at a time.

Blocks of columns with lazy updates of the rest (Frantar et al. 2023, sect. 3.3), the upper Cholesky factor of
the inverse, float32, `torch.linalg.svd`. Same order of columns, scale search and rounds as bitalloc, so the errors
agree; factors of the low-rank part are not rounded to 8 bits.

Shapes: O outputs (rows), I inputs (columns), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitalloc.lowrank import leading

GROUP, DAMPING = 128, 0.1


@dataclass(frozen=True)
class Shared:
    """What all options of a matrix have in common, columns in the order of processing."""

    W_OI: Tensor
    H_II: Tensor  # damped
    lam: float
    M_II: Tensor  # M M^T = H
    U_II: Tensor  # U^T U = H^-1, upper

    @classmethod
    def of(cls, W_OI: Tensor, H_II: Tensor) -> Shared:
        lam = DAMPING * float(H_II.diagonal().mean())
        energy = H_II.diagonal().view(-1, GROUP)
        groups = energy.sum(1).argsort(descending=True)
        inside = energy[groups].argsort(1, descending=True)
        order = (groups[:, None] * GROUP + inside).flatten()
        H_II = H_II[order][:, order].clone()
        H_II.diagonal().add_(lam)
        M_II = torch.linalg.cholesky(H_II)
        U_II = torch.linalg.cholesky(torch.cholesky_inverse(M_II), upper=True)
        return cls(W_OI[:, order], H_II, lam, M_II, U_II)

    def error(self, D_OI: Tensor) -> tuple[float, float]:
        """Damped and undamped tr(D H D^T)."""
        damped = float(((D_OI @ self.H_II) * D_OI).sum(dtype=torch.float64))
        return damped, damped - self.lam * float(D_OI.square().sum(dtype=torch.float64))


def scales(w_Og: Tensor, weight_g: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    lo, hi = w_Og.amin(1, keepdim=True).clamp(max=0), w_Og.amax(1, keepdim=True).clamp(min=0)
    zero, best, scale = (-lo * top / (hi - lo)).round(), None, None
    for step in range(11):
        s = ((hi - lo) * (1 - step / 20) / top).half().float()
        q = ((w_Og / s).round() + zero).clamp(0, top) - zero
        error = ((q * s - w_Og).square() * weight_g).sum(1, keepdim=True)
        if best is None:
            best, scale = error, s
        else:
            scale, best = torch.where(error < best, s, scale), torch.minimum(error, best)
    return scale, zero


def gptq(W_OI: Tensor, shared: Shared, bits: int) -> Tensor:
    """Q_OI, the nearest grid points with error feedback."""
    W_OI, Q_OI, top = W_OI.clone(), torch.empty_like(W_OI), 2**bits - 1
    for a in range(0, W_OI.shape[1], GROUP):
        b = a + GROUP
        w_Og, U_gg, E_Og = W_OI[:, a:b].clone(), shared.U_II[a:b, a:b], torch.empty_like(W_OI[:, a:b])
        scale, zero = scales(w_Og, shared.H_II.diagonal()[a:b], bits)
        for j in range(GROUP):
            w = w_Og[:, j : j + 1]
            q = (((w / scale).round() + zero).clamp(0, top) - zero) * scale
            Q_OI[:, a + j : a + j + 1] = q
            E_Og[:, j : j + 1] = e = (w - q) / U_gg[j, j]
            w_Og[:, j:] -= e @ U_gg[j : j + 1, j:]
        W_OI[:, b:] -= E_Og @ shared.U_II[a:b, b:]
    return Q_OI


def lowrank(T_OI: Tensor, shared: Shared, rank: int, *, exact: bool) -> Tensor:
    """L R, the best in the norm of the moments, by the whole SVD or a randomised one."""
    whitened = T_OI @ shared.M_II
    if exact:
        U, S, V = torch.linalg.svd(whitened, full_matrices=False)
        L_OR, B_RI = U[:, :rank] * S[:rank], V[:rank]
    else:
        L_OR, B_RI = leading(whitened, rank)
    return L_OR @ torch.linalg.solve_triangular(shared.M_II, B_RI, upper=False, left=False)


def option(shared: Shared, bits: int, rank: int, *, start: Tensor | None = None, codes: Tensor | None = None) -> float:
    """rel_error of one option: both starts, quantise, refit.

    `start` is the low-rank part of W and `codes` its nearest grid points, where they are known from other options.
    """
    W_OI = shared.W_OI
    exact = start is None
    codes = gptq(W_OI, shared, bits) if codes is None else codes
    found = [shared.error(W_OI - codes)]
    if rank:
        LR = lowrank(W_OI, shared, rank, exact=True) if start is None else start
        rest = W_OI - gptq(W_OI - LR, shared, bits)
        found = [shared.error(rest - LR), shared.error(rest - lowrank(rest, shared, rank, exact=exact))]
        rest = W_OI - codes
        found.append(shared.error(rest - lowrank(rest, shared, rank, exact=exact)))
    return min(found)[1] / shared.error(W_OI)[1]
