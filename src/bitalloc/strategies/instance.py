"""The allocation problem as arrays: a multiple-choice knapsack.

Every matrix takes one option; the bytes may not exceed the budget; the sum of costs shall be least.

Legend: N matrices, K options; `choice_N` holds an option index for each matrix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitalloc.errors import BitallocError
from bitalloc.option import Option

Choice = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Instance:
    """Matrices, their options, what each takes in bytes and costs in nats a token.

    `costs_NK` is infinite where a matrix does not offer an option; such an entry then counts as many bytes as the
    matrix's largest option, so that it never wins and never widens the range of reachable bytes. `efficient_NK` is
    `costs_NK` with infinity also where another option of the matrix is no worse in bytes and cost. `apart_N` marks
    what has options of its own, an embedding or a head, and keeps out of rules for all matrices.

    Raises `BitallocError` for a cost that is NaN or negative and for a matrix without options.
    """

    layers: tuple[str, ...]
    options: tuple[Option, ...]
    weights_N: NDArray[np.int64]
    nbytes_NK: NDArray[np.int64]
    costs_NK: NDArray[np.float64]
    apart_N: NDArray[np.bool_] = field(default=None)  # type: ignore[assignment] - none
    efficient_NK: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        if self.apart_N is None:
            object.__setattr__(self, "apart_N", np.zeros(len(self.layers), dtype=bool))
        offered_NK = np.isfinite(self.costs_NK)
        if np.isnan(self.costs_NK).any() or (self.costs_NK < 0).any():
            i, k = np.argwhere(~(self.costs_NK >= 0))[0]
            raise BitallocError(
                f"{self.layers[i]} at {self.options[k].name} costs {self.costs_NK[i, k]}: coefficient and rel_error "
                "must be finite and not negative; repeat its sweep and sensitivity"
            )
        if not len(self.layers) or not offered_NK.any(axis=1).all():
            bare = [layer for layer, offers in zip(self.layers, offered_NK.any(axis=1), strict=True) if not offers]
            raise BitallocError(f"nothing to choose from for {bare[0] if bare else 'any matrix'}; widen sweep options")
        most_N = np.where(offered_NK, self.nbytes_NK, 0).max(axis=1)
        object.__setattr__(self, "nbytes_NK", np.where(offered_NK, self.nbytes_NK, most_N[:, None]))
        object.__setattr__(self, "efficient_NK", np.where(self._dominated(), np.inf, self.costs_NK))

    def _dominated(self) -> NDArray[np.bool_]:
        """[N, K] options that another one of the same matrix beats or, of lower index, equals in bytes and cost."""
        no_worse = (self.nbytes_NK[:, :, None] >= self.nbytes_NK[:, None, :]) & (  # [N, K, other]
            self.costs_NK[:, :, None] >= self.costs_NK[:, None, :]
        )
        equal = no_worse & no_worse.transpose(0, 2, 1)
        index = np.arange(len(self.options))
        return (no_worse & (~equal | (index[None, :] < index[:, None]))).any(axis=2)

    @property
    def least(self) -> int:
        """Bytes of the smallest plan."""
        return int(self.nbytes_NK.min(axis=1).sum())

    @property
    def most(self) -> int:
        """Bytes of the largest plan."""
        return int(self.nbytes_NK.max(axis=1).sum())

    def at(self, values_NK: NDArray, choice_N: Choice) -> NDArray:
        """[N] entries of the chosen options."""
        return values_NK[np.arange(len(self.layers)), choice_N]

    def objective(self, choice_N: Choice) -> float:
        """Sum of costs, nats a token."""
        return float(self.at(self.costs_NK, choice_N).sum())

    def size(self, choice_N: Choice) -> int:
        """Bytes of the plan."""
        return int(self.at(self.nbytes_NK, choice_N).sum())

    def bits_per_weight(self, nbytes: int) -> float:
        return 8 * nbytes / int(self.weights_N.sum())

    def smallest(self) -> Choice:
        """The plan of fewest bytes; among options of equal bytes the cheapest."""
        return np.where(np.isfinite(self.efficient_NK), self.nbytes_NK, np.iinfo(np.int64).max).argmin(axis=1)

    def without_apart(self) -> Instance:
        """The problem of the matrices that rules for all speak of."""
        kept_N = ~self.apart_N
        layers = tuple(layer for layer, kept in zip(self.layers, kept_N, strict=True) if kept)
        parts = self.weights_N[kept_N], self.nbytes_NK[kept_N], self.costs_NK[kept_N]
        return Instance(layers, self.options, *parts)

    def restricted(self, allowed_K: NDArray[np.bool_]) -> Instance:
        """The same problem with only some of the options; indices keep their meaning."""
        return dataclasses.replace(self, costs_NK=np.where(allowed_K, self.costs_NK, np.inf))

    def reweighted(self, factor_N: NDArray[np.float64]) -> Instance:
        """The same problem with every matrix's costs multiplied by a factor."""
        return dataclasses.replace(self, costs_NK=self.costs_NK * factor_N[:, None])

    def fused(self, unit_N: NDArray[np.int64]) -> Instance:
        """The problem of units of matrices that take one option together; `unit_N` holds the unit of each.

        A unit bears the name of its first matrix.
        """
        first_U = np.unique(unit_N, return_index=True)[1]

        def summed(values: NDArray) -> NDArray:
            total = np.zeros((len(first_U), *values.shape[1:]), dtype=values.dtype)
            np.add.at(total, unit_N, values)
            return total

        layers = tuple(self.layers[i] for i in first_U)
        parts = summed(self.weights_N), summed(self.nbytes_NK), summed(self.costs_NK), self.apart_N[first_U]
        return Instance(layers, self.options, *parts)

    def reach(self, rest: int = 0) -> str:
        """The reachable sizes, for error messages; `rest` bytes are added to both ends."""
        bits = f"{self.bits_per_weight(self.least):.3f} to {self.bits_per_weight(self.most):.3f} bits a weight"
        return f"reachable: {self.least + rest:,} to {self.most + rest:,} bytes ({bits})"

    def require(self, budget: int) -> None:
        """Raise `BitallocError` when no plan fits."""
        if budget < self.least:
            raise BitallocError(f"a budget of {budget:,} bytes is below the least possible; {self.reach()}")
