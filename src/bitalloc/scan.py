"""Mamba2's selective scan as matrix products, in the place of the one that transformers runs without CUDA kernels.

The state space of a head is S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, read as y_t = S_t C_t + D x_t. Over a chunk of
Q tokens that is one masked product, y = (C B^T * L) (dt x) with L_ts = exp(sum_{s<u<=t} dt_u A), plus what the state
before the chunk adds; only the state passes from chunk to chunk (the dual form: Dao and Gu, Transformers are SSMs,
2024, arXiv:2405.21060, section 6). Transformers' reference does the same products by broadcasting and summing, which
holds Q N numbers for every token and head. Here a chunk at a time is held: without gradients the memory beyond input
and output does not grow with the length, with gradients linearly.

Legend: B sequences (batch), T tokens, H heads of P channels in G groups of h, N entries of state a channel, Q tokens
of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import softplus

MATRIX, LIBRARY, KERNELS = "matrix", "transformers", "cuda kernels"  # what `scan_path` tells


def scan(  # noqa: PLR0917 - its caller's signature
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    B_BTGN: torch.Tensor,
    C_BTGN: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y [B, T, H, P], float32, and if asked the last state [B, H, P, N]; called as transformers' `mamba2_chunk_scan`.

    `D` and `dt_bias` are [H], `initial_states` is [B, H, P, N]. The steps dt are clamped to `dt_limit`. The result does
    not depend on `chunk_size`; a token costs Q (N / h + P) + 2 N P multiplications a head.
    """
    heads, groups = x_BTHP.shape[2], B_BTGN.shape[2]
    if dt_bias is not None:
        dt_BTH = dt_BTH + dt_bias.to(dt_BTH.dtype)
    if dt_softplus:
        dt_BTH = softplus(dt_BTH)
    dt_BTH = dt_BTH.clamp(*dt_limit).float()
    x_BTHP = x_BTHP.float()
    # in double precision: what is wanted are differences of these sums, small ones too where the sums are large
    a_BTH = dt_BTH.double() * A_H.double()
    whole = (x_BTHP * dt_BTH[..., None], a_BTH, B_BTGN.float(), C_BTGN.float())
    if initial_states is None:
        S = x_BTHP.new_zeros(len(x_BTHP), groups, heads // groups, x_BTHP.shape[3], B_BTGN.shape[3])
    else:
        S = initial_states.to(x_BTHP).unflatten(1, (groups, -1))
    parts = []
    for u, a, B, C in zip(*(tensor.split(chunk_size, dim=1) for tensor in whole), strict=True):
        y, S = _chunk(u.unflatten(2, (groups, -1)), a.unflatten(2, (groups, -1)), B, C, S)
        parts.append(y)
    y_BTHP = torch.cat(parts, dim=1).flatten(2, 3)
    if D is not None:
        y_BTHP = y_BTHP + x_BTHP * D[:, None]
    return (y_BTHP, S.flatten(1, 2)) if return_final_states else y_BTHP


def _chunk(
    u_BQGhP: torch.Tensor, a_BQGh: torch.Tensor, B_BQGN: torch.Tensor, C_BQGN: torch.Tensor, S_BGhPN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, Q, G, h, P] and the state behind a chunk, from u = dt x, a = dt A and the state before it."""
    sum_BGhQ = a_BQGh.cumsum(1).permute(0, 2, 3, 1)
    after = torch.ones(2 * [sum_BGhQ.shape[-1]], dtype=torch.bool, device=a_BQGh.device).triu(1)
    # masked before exp: what lies above the diagonal may overflow
    L_BGhQQ = (sum_BGhQ[..., :, None] - sum_BGhQ[..., None, :]).float().masked_fill(after, -torch.inf).exp()
    M_BGhQQ = torch.einsum("btgn,bsgn->bgts", C_BQGN, B_BQGN)[:, :, None] * L_BGhQQ
    u_BGhQP = u_BQGhP.permute(0, 2, 3, 1, 4)
    before = torch.einsum("btgn,bghpn->bghtp", C_BQGN, S_BGhPN) * sum_BGhQ.float().exp()[..., None]
    y_BGhQP = M_BGhQQ @ u_BGhQP + before
    left = (sum_BGhQ[..., -1:] - sum_BGhQ).float().exp()[..., None]
    new = torch.einsum("bghsp,bsgn->bghpn", u_BGhQP * left, B_BQGN)
    return y_BGhQP.permute(0, 3, 1, 2, 4), S_BGhPN * sum_BGhQ[..., -1:, None].float().exp() + new


# ---- which scan a model runs -------------------------------------------------------------------------
@cache
def shipped() -> Callable[..., Any]:
    """The scan of transformers: CUDA kernels where `mamba_ssm` is installed, else the reference."""
    from transformers.models.mamba2 import modeling_mamba2

    return modeling_mamba2.mamba2_chunk_scan  # the first call comes before anything has taken its place


def install(device: torch.device) -> None:
    """From now on every Mamba2 of this process scans by matrix products, unless the device has kernels for it."""
    if not _kernels(device):
        _put(scan)


@contextmanager
def matrix_scan(on: bool = True) -> Iterator[None]:
    """Within, every Mamba2 of this process scans by matrix products, or, if not `on`, as transformers ships it."""
    from transformers.models.mamba2 import modeling_mamba2

    before = modeling_mamba2.mamba2_chunk_scan
    _put(scan if on else shipped())
    try:
        yield
    finally:
        _put(before)


def scan_path(device: torch.device) -> str:
    """How a Mamba2 scans a prompt on this device: matrix, transformers or cuda kernels. Goes with every measurement."""
    from transformers.models.mamba2 import modeling_mamba2

    if modeling_mamba2.mamba2_chunk_scan is scan:
        return MATRIX
    return KERNELS if _kernels(device) else LIBRARY


def scan_path_of(model: Any, device: torch.device) -> str | None:
    """The same of a model; None for one that does not scan."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return scan_path(device) if kind == "mamba2" else None


def _put(function: Callable[..., Any]) -> None:
    from transformers.models.mamba2 import modeling_mamba2

    shipped()
    modeling_mamba2.mamba2_chunk_scan = function


def _kernels(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("mamba_ssm") is not None
