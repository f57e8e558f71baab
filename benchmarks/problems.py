"""The matrices that the benchmarks work on: seeded, of any shape, with inputs as uneven as those of real models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OUTLIERS = 512  # one input channel in 512 is one


class Problem(NamedTuple):
    """A matrix, T = 2 I inputs of it, and their second moment X^T X / T; all float32."""

    W_OI: Tensor
    X_TI: Tensor
    H_II: Tensor


def problem(rows: int, columns: int, seed: int = 0, gain: float = 30) -> Problem:
    """Weights whose scale falls threefold along the input; correlated inputs, outliers `gain` times as large."""
    draw = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(rows, columns, generator=draw) * torch.linspace(1.5, 0.5, columns)
    X_TI = torch.randn(2 * columns, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    X_TI = X_TI / columns**0.5 + torch.randn(2 * columns, columns, generator=draw)
    X_TI[:, torch.randperm(columns, generator=draw)[: max(1, columns // OUTLIERS)]] *= gain
    return Problem(W_OI, X_TI, X_TI.T @ X_TI / len(X_TI))


def relative_error(W_OI: Tensor, What_OI: Tensor, H_II: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - What: the share of the output's energy that is lost."""
    energy = [float(((D_OI @ H_II) * D_OI).sum(dtype=torch.float64)) for D_OI in (W_OI - What_OI, W_OI)]
    return energy[0] / energy[1]
