"""Monotone interpolation of log E over bits and log(rank + 1), for each matrix, quantizer and group size.

Legend: M matrices, K options, B bits, R ranks, X points along one axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from bitalloc.laws.data import Array, Errors, patterns

INTERPOLATION = "interpolation"


def _grids(errors: Errors) -> Iterator[tuple[Array, Array, NDArray[np.intp]]]:
    """Each (quantizer, group size): its bits_B, log(rank + 1)_R and the place of each option, index_BR (-1: none)."""
    for _, cell in errors.options.groupby(["quantizer", "group_size"], sort=False):
        grid = cell.assign(place=cell.index).pivot(index="bits", columns="rank", values="place").fillna(-1)
        yield grid.index.to_numpy(float), np.log1p(grid.columns.to_numpy(float)), grid.to_numpy(int)


def _take(log_MK: Array, index_BR: NDArray[np.intp]) -> Array:
    return np.where(index_BR >= 0, log_MK[:, index_BR], np.nan)


def _project(log_MBR: Array) -> Array:
    """The nearest-to-both monotone surface: the mean of the largest one below the data and the smallest above.

    >>> _project(np.array([[[0.0, -2.0, -1.0]]]))
    array([[[ 0. , -1.5, -1.5]]])
    """
    below, above = log_MBR, log_MBR[:, ::-1, ::-1]
    for axis in (1, 2):
        below, above = np.fmin.accumulate(below, axis=axis), np.fmax.accumulate(above, axis=axis)
    return np.where(np.isfinite(log_MBR), (below + above[:, ::-1, ::-1]) / 2, np.nan)


def monotone(errors: Errors) -> Array:
    """log E_MK with the noise that lets it rise with bits or rank taken out."""
    projected_MK = errors.log_MK.copy()
    for _, _, index_BR in _grids(errors):
        projected_MK[:, index_BR[index_BR >= 0]] = _project(_take(errors.log_MK, index_BR))[:, index_BR >= 0]
    return projected_MK


def along(x: Array, y_MX: Array, at: float) -> Array:
    """Monotone cubic interpolation at one point, linear beyond the ends, constant where one point is known."""
    if len(x) == 1:
        return y_MX[:, 0]
    if x[0] <= at <= x[-1]:
        return PchipInterpolator(x, y_MX, axis=1)(at)
    a, b = (0, 1) if at < x[0] else (-1, -2)
    return y_MX[:, a] + (at - x[a]) * (y_MX[:, b] - y_MX[:, a]) / (x[b] - x[a])


def between(x: Array, y_MX: Array, at: float) -> Array:
    """Linear interpolation, constant beyond the ends."""
    j = int(np.clip(np.searchsorted(x, at) - 1, 0, max(len(x) - 2, 0)))
    if len(x) == 1:
        return y_MX[:, 0]
    share = np.clip((at - x[j]) / (x[j + 1] - x[j]), 0, 1)
    return (1 - share) * y_MX[:, j] + share * y_MX[:, j + 1]


def interpolated(errors: Errors) -> Array:
    """log E of each option from the others of its matrix, quantizer and group size.

    A left-out option is interpolated along rank in its own row of bits, then corrected by the error that the same
    interpolation makes in the rows where the option is known, itself interpolated along bits (beyond the last: the
    nearest one, since two rows extrapolate noise). The first and last rank are extrapolated linearly in log E.
    """
    predicted_MK = np.full_like(errors.log_MK, np.nan)
    for bits, ranks, index_BR in _grids(errors):
        surface = _take(errors.log_MK, index_BR)
        for mask, members in patterns(np.isfinite(surface).reshape(len(surface), -1)):
            for b, r in np.argwhere(mask.reshape(index_BR.shape)):
                held = surface[members]
                held[:, b, r] = np.nan
                predicted_MK[members, index_BR[b, r]] = _fill(bits, ranks, _project(held), b, r)
    return predicted_MK


def _fill(bits: Array, ranks: Array, log_MBR: Array, b: int, r: int) -> Array:
    """log E_M at (b, r), where all matrices lack the same points; NaN where nothing bears on it."""
    known = np.isfinite(log_MBR[0])
    rows = np.flatnonzero(known[:, r])
    across = known[b]
    if not across.any():
        return along(bits[rows], log_MBR[:, rows, r], bits[b]) if len(rows) else np.full(len(log_MBR), np.nan)
    rows = rows[known[rows][:, across].all(axis=1)]
    here = along(ranks[across], log_MBR[:, b, across], ranks[r])
    if not len(rows):
        return here
    missed = [log_MBR[:, row, r] - along(ranks[across], log_MBR[:, row, across], ranks[r]) for row in rows]
    return here + between(bits[rows], np.column_stack(missed), bits[b])
