"""Rotations by a randomised Hadamard matrix: they spread an outlier over all inputs and change no product.

R = H D / sqrt(n), D random signs. For an orthogonal R, W x = (W R^T)(R x): what multiplies the weights is folded into
them, once; R x is work at run time, unless whatever makes x is linear up to there and takes R itself. (Chee et al.,
QuIP, 2023; Ashkboos et al., QuaRot, 2024, sect. 3; for the out_proj of Mamba2: Chiang et al., Quamba2, 2025.)

H of n inputs is a product of small ones, H_n = H_m x H_a x H_b .. (Kronecker): powers of two by Sylvester, m by Paley's
first construction, for a prime p = m - 1 with p = 3 mod 4, where n has such a divisor: 768 = 12 x 64, 1536, 2560 = 20 x
128, 5120. Where it has none, blocks of the largest power of two are rotated each by itself.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

LARGEST_FACTOR = 16  # products with small matrices: n (16 + 16) instead of n^2 operations at n = 256
LARGEST_PALEY = 256


class Rotation:
    """x -> R x over the last axis, of `dim` entries; R is orthogonal and depends on `dim` and `seed` alone.

    >>> R = Rotation(12, seed=0)
    >>> bool(torch.allclose(R(torch.eye(12)) @ R(torch.eye(12)).T, torch.eye(12), atol=1e-6))
    True
    """

    def __init__(self, dim: int, *, seed: int = 0, device: torch.device | None = None) -> None:
        self.dim, self.orders = dim, orders(dim)
        signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        self.signs_I = signs.to(device)
        self.factors = [(hadamard(order) / math.sqrt(order)).to(device) for order in self.orders]

    def __call__(self, x_I: Tensor) -> Tensor:
        shape = x_I.shape
        x = (x_I * self.signs_I.to(x_I.dtype)).reshape(-1, self.dim // math.prod(self.orders), *self.orders)
        for axis, factor in enumerate(self.factors, 2):
            x = torch.tensordot(x, factor.to(x.dtype), dims=([axis], [1])).movedim(-1, axis)
        return x.reshape(shape)

    def inverse(self, x_I: Tensor) -> Tensor:
        """R^T x."""
        shape = x_I.shape
        x = x_I.reshape(-1, self.dim // math.prod(self.orders), *self.orders)
        for axis, factor in enumerate(self.factors, 2):
            x = torch.tensordot(x, factor.to(x.dtype), dims=([axis], [0])).movedim(-1, axis)
        return x.reshape(shape) * self.signs_I.to(x_I.dtype)

    def moments(self, H_II: Tensor) -> Tensor:
        """R H R^T, the moments of R x."""
        return self(self(H_II).T)


def orders(dim: int) -> tuple[int, ...]:
    """Orders of the factors of H; their product divides `dim`, and is `dim` wherever a construction is known here.

    >>> orders(256), orders(768), orders(5120), orders(96 * 7)
    ((16, 16), (12, 16, 4), (20, 16, 16), (84, 8))
    >>> orders(11008)  # 43 blocks
    (16, 16)
    """
    odd = dim // (dim & -dim)
    for m in [1, *(m for m in range(4, min(dim, LARGEST_PALEY) + 1, 4) if _paley(m - 1))]:
        if m % odd == 0 and dim % m == 0 and (dim // m).bit_count() == 1:
            return (*((m,) if m > 1 else ()), *_powers(dim // m))
    return _powers(dim & -dim)


def _powers(n: int) -> tuple[int, ...]:
    """A power of two as factors of at most `LARGEST_FACTOR`."""
    found = []
    while n > 1:
        found.append(min(n, LARGEST_FACTOR))
        n //= found[-1]
    return tuple(found)


def _paley(p: int) -> bool:
    return p % 4 == 3 and all(p % d for d in range(2, math.isqrt(p) + 1))


@cache
def hadamard(order: int) -> Tensor:
    """H [order, order] with entries +-1 and H H^T = order I; `order` is a power of two or p + 1 as `orders` has it.

    >>> H = hadamard(20)
    >>> bool((H @ H.T == 20 * torch.eye(20)).all()), bool((H.abs() == 1).all())
    (True, True)
    """
    if order.bit_count() == 1:
        H = torch.ones(1, 1)
        while len(H) < order:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        return H
    p = order - 1
    squares = {k * k % p for k in range(1, p)}
    character = torch.tensor([0.0, *(1.0 if k in squares else -1.0 for k in range(1, p))])
    place = torch.arange(p)
    Q = character[(place[:, None] - place[None]) % p]
    S = torch.zeros(order, order)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1.0, -1.0, Q
    return S + torch.eye(order)
