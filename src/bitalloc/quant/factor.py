"""The moments of a site, damped, put in the order of processing and factorised.

One upper-triangular M with M M^T = H + lambda I serves three ends. Error feedback: column j of D M is
M_jj (D_j + sum over i < j of D_i M_ij / M_jj), so rounding W_j plus that sum makes it small (GPTQ, Frantar
et al. 2023; LDLQ, Chee et al. 2023, sect. 3; no inverse is formed). Whitening: ||D M||_F^2 is the calibrated
error of D. And the error itself, for the feedback leaves D M behind.

Shapes: I inputs (columns of a matrix), R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitalloc.errors import BitallocError

BLOCK = 1024


@dataclass(frozen=True)
class Group:
    """Columns start..stop of the processing order; `place` is the group's in it, `index` the one in storage."""

    start: int
    stop: int
    place: int
    index: int


@dataclass(frozen=True)
class Order:
    """The order in which columns are quantised. Groups stay whole, so nothing about it needs to be stored."""

    permutation_I: Tensor  # place in processing -> column of the matrix
    groups: tuple[Group, ...]
    M_II: Tensor  # upper triangular, in the order of processing
    weight_I: Tensor  # diagonal of H + lambda I, in the order of processing

    def whiten(self, X_IN: Tensor) -> Tensor:
        """M^T X, inputs in the order of processing; the zeros of M are left out a block of rows at a time."""
        Y_IN = torch.empty_like(X_IN)
        for a in range(0, len(X_IN), BLOCK):
            b = min(a + BLOCK, len(X_IN))
            torch.mm(self.M_II[:b, a:b].T, X_IN[:b], out=Y_IN[a:b])
        return Y_IN

    def unwhiten(self, B_RI: Tensor) -> Tensor:
        """X_RI with X M = B, columns in the order of processing."""
        return torch.linalg.solve_triangular(self.M_II, B_RI, upper=True, left=False)

    def stored(self, X_I: Tensor) -> Tensor:
        """Rows of X, given in the order of processing, put back in their places."""
        return torch.empty_like(X_I).index_copy_(0, self.permutation_I, X_I)

    def stored_groups(self, X_G: Tensor) -> Tensor:
        """The same for a tensor with one row for each group."""
        index = torch.tensor([group.index for group in self.groups], device=X_G.device)
        return torch.empty_like(X_G).index_copy_(0, index, X_G)


class Factor:
    """H_II + lambda I of one site, lambda = `damping` times the mean diagonal; orders are made once each.

    With `reread` H is let go once it is factorised, and read again in the rare case that it is needed.
    Raises `BitallocError` when H has NaN or Inf, is zero, or is not positive definite after damping.
    """

    def __init__(
        self, H_II: Tensor, damping: float, *, name: str = "H", reread: Callable[[], Tensor] | None = None
    ) -> None:
        if not all(bool(H.isfinite().all()) for H in H_II.split(BLOCK)):
            raise BitallocError(f"moments of {name} have NaN or Inf; check the checkpoint and calibrate again")
        self.name = name
        self.diagonal_I = H_II.diagonal().clone()
        self.lam = float(damping * self.diagonal_I.double().mean())
        if self.lam <= 0:
            raise BitallocError(f"moments of {name} are zero: no text reached it; calibrate on more or other text")
        self._read = reread or (lambda: H_II)
        self._held: Tensor | None = H_II
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def H_II(self) -> Tensor:  # noqa: N802 - the name of the paper
        return self._read() if self._held is None else self._held

    def energy(self, D_OI: Tensor) -> float:
        """tr(D H D^T), undamped: the squared output error that D makes for each token."""
        return float(((D_OI @ self.H_II) * D_OI).sum(dtype=torch.float64))

    def order(self, group_size: int, act_order: bool) -> Order:
        """Columns as they come, or (`act_order`) groups by falling energy and columns within them likewise.

        The feedback of early columns falls on later ones, so the columns that matter most go first.
        """
        diagonal_I = self.diagonal_I
        starts = range(0, len(diagonal_I), group_size)
        places = list(range(len(starts)))
        if act_order:
            total_G = torch.stack([diagonal_I[s : s + group_size].double().sum() for s in starts])
            places = total_G.argsort(descending=True, stable=True).tolist()
        groups, columns, at = [], [], 0
        for place in places:
            size = min(group_size, len(diagonal_I) - starts[place])
            groups.append(Group(at, at := at + size, len(groups), place))
            inside = torch.arange(starts[place], starts[place] + size, device=diagonal_I.device)
            columns.append(inside[diagonal_I[inside].argsort(descending=True, stable=True)] if act_order else inside)
        permutation_I = torch.cat(columns)
        weight_I = diagonal_I[permutation_I] + self.lam
        # without reordering, every group size has the same factor
        key = group_size if act_order else 0
        if key not in self._factors:
            self._factors[key] = (permutation_I, self._cholesky(permutation_I))
        return Order(permutation_I, tuple(groups), self._factors[key][1], weight_I)

    def _cholesky(self, permutation_I: Tensor) -> Tensor:
        # in float64: at weak damping an outlier input leaves too few digits of float32. In place, for this
        # is the largest array of a sweep: with 18944 inputs it takes 2.9 GB
        H_II, flipped, n = self.H_II, permutation_I.flip(0), len(permutation_I)
        self._held = None
        A_II = H_II.new_empty(n, n, dtype=torch.float64)
        for a in range(0, n, BLOCK):
            A_II[a : a + BLOCK] = H_II[flipped[a : a + BLOCK]].index_select(1, flipped)
        del H_II
        A_II.diagonal().add_(self.lam)
        A_II, info = A_II.T, torch.empty((), dtype=torch.int32, device=A_II.device)
        torch.linalg.cholesky_ex(A_II, out=(A_II, info))
        if int(info):
            raise BitallocError(
                f"moments of {self.name} are not positive definite; raise sweep.damping or calibrate on more text"
            )
        M_II = A_II.new_zeros(n, n, dtype=torch.float32)
        for a in range(0, n, BLOCK):
            b = min(a + BLOCK, n)
            M_II[a:b, a:] = A_II[n - b : n - a, : n - a].flip(0, 1)
        return M_II.triu_()
