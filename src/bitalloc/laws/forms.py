"""Least-squares fits of the laws to log E (see the package for the formulas).

What belongs to one matrix alone enters log E linearly, so it is projected out in closed form; what remains are a
handful of shared parameters over the K options, whatever the number of matrices: linear least squares, or
`scipy.optimize.least_squares` for the additive law.

Legend: M matrices, K options, P coefficients of a matrix's own, T shared parameters, C cells but the first,
S weightings of the matrices (the first is uniform, the others are bootstrap resamples), X any rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from bitalloc.laws.data import Array, Errors, patterns

DECAY = {"additive": "delta", "multiplicative": "delta", "exponential": "kappa"}  # form -> its decay with rank
_LN2 = float(np.log(2))
_STARTS = (-6.0, -3.0, -1.0)  # log gamma: the additive law has more than one valley
_RIDGE = 1e-4  # keeps a parameter that the options cannot tell where it started


@dataclass(frozen=True)
class Fitted:
    theta_ST: Array  # shared parameters: beta, [log gamma, delta], log offset of each cell but the first
    own_SMP: Array  # coefficients of each matrix: log s_i, then its decay, if it has one
    log_MK: Array  # prediction of every option under the first weighting


def told(parameter: str, errors: Errors) -> bool:
    """Whether the options vary in what the parameter describes."""
    if parameter == "beta":
        return len(set(errors.bits_K)) > 1
    return parameter.startswith("factor") or len(set(errors.rank_K)) > 1


def gamma(log_gamma: Array) -> Array:
    return np.exp(np.clip(log_gamma, -700, 700))


def _decay(form: str, rank: Array) -> Array:
    return -np.log1p(rank) if DECAY[form] == "delta" else -rank


def _additive(bits: Array, rank: Array, beta: Array, log_gamma: Array, delta: Array) -> Array:
    return np.logaddexp(-_LN2 * beta * bits, log_gamma - delta * np.log1p(rank))


def rank_shape(form: str, own: Mapping[str, Array], bits: float, ranks: Array) -> Array:
    """log E of the law over ranks, up to a constant of the matrix."""
    if form == "additive":
        return _additive(np.array(bits), ranks, own["beta"], np.log(own["gamma"]), own["delta"])
    return own[DECAY[form]] * _decay(form, ranks)


def fit_law(form: str, errors: Errors, weights_SM: Array, *, start: Array | None = None, apart: bool = False) -> Fitted:
    """Least squares on log E. `start` is where the additive law's search begins; `apart` gives each matrix every
    parameter (not for the additive law)."""
    log_MK = errors.log_MK
    own_KP, shared_KT = np.ones((log_MK.shape[1], 1)), np.column_stack([-_LN2 * errors.bits_K, errors.cells_KC])
    if form != "additive":
        own_KP = np.column_stack([own_KP, _decay(form, errors.rank_K)])
    if apart:
        own_KP, shared_KT = np.column_stack([own_KP, shared_KT]), shared_KT[:, :0]

    # What a matrix's own coefficients cannot explain of y is Proj y, so the sum of squares over all matrices,
    # (y - g)^T Proj (y - g), needs only the weighted sums of Proj and of Proj y.
    filled_MK = np.nan_to_num(log_MK)
    gram_SKK, target_SK, solvers = 0.0, 0.0, []
    for mask_K, members in patterns(np.isfinite(log_MK)):
        centred_KP = own_KP.copy()
        centred_KP[:, 1:] -= own_KP[mask_K, 1:].mean(axis=0)
        masked_KP = centred_KP * mask_K[:, None]
        inverse_PK = np.linalg.pinv(masked_KP, rcond=1e-10)
        project_KK = np.diag(mask_K.astype(float)) - masked_KP @ inverse_PK
        weights = weights_SM[:, members]
        gram_SKK = gram_SKK + weights.sum(axis=1)[:, None, None] * project_KK
        target_SK = target_SK + weights @ filled_MK[members] @ project_KK
        solvers.append((members, centred_KP, inverse_PK))

    if form == "additive":
        theta_ST, shape_SK = _solve_additive(errors, gram_SKK, target_SK, start)
    else:
        normal_STT = shared_KT.T @ gram_SKK @ shared_KT
        inverse_STT = np.linalg.pinv(normal_STT, rcond=1e-10, hermitian=True)
        theta_ST = np.einsum("sab,sb->sa", inverse_STT, target_SK @ shared_KT)
        shape_SK = theta_ST @ shared_KT.T
    own_SMP = np.empty((len(weights_SM), len(log_MK), own_KP.shape[1]))
    fitted_MK = np.empty_like(log_MK)
    for members, centred_KP, inverse_PK in solvers:
        own_SMP[:, members] = (filled_MK[members] @ inverse_PK.T)[None] - (shape_SK @ inverse_PK.T)[:, None]
        fitted_MK[members] = shape_SK[0] + own_SMP[0, members] @ centred_KP.T
    return Fitted(theta_ST, own_SMP, fitted_MK)


def _solve_additive(errors: Errors, gram_SKK: Array, target_SK: Array, start: Array | None) -> tuple[Array, Array]:
    bits, rank, cells_KC = errors.bits_K, errors.rank_K, errors.cells_KC

    def shape(theta: Array) -> Array:
        return _additive(bits, rank, *theta[:3]) + cells_KC @ theta[3:]

    def slope(theta: Array) -> Array:
        share = np.exp(-_LN2 * theta[0] * bits - _additive(bits, rank, *theta[:3]))
        return np.column_stack([-_LN2 * bits * share, 1 - share, -np.log1p(rank) * (1 - share), cells_KC])

    def solve(gram_KK: Array, target_K: Array, start: Array) -> tuple[float, Array]:
        scale = max(float(np.trace(gram_KK)), 1e-12)
        values, vectors = np.linalg.eigh(gram_KK / scale)
        root = np.sqrt(values[values > 1e-10])
        root_XK = root[:, None] * vectors[:, values > 1e-10].T
        aim_X = (vectors[:, values > 1e-10].T @ target_K) / scale / root
        found = least_squares(
            lambda theta: np.concatenate([root_XK @ shape(theta) - aim_X, _RIDGE * (theta - start)]),
            start,
            jac=lambda theta: np.vstack([root_XK @ slope(theta), _RIDGE * np.eye(len(theta))]),
            method="lm",
            ftol=1e-6,
            xtol=1e-6,
        )
        return float(found.cost), found.x

    zeros = np.zeros(cells_KC.shape[1])
    starts = [np.concatenate([[2.0, guess, 0.3], zeros]) for guess in _STARTS] if start is None else [start]
    first = min((solve(gram_SKK[0], target_SK[0], guess) for guess in starts), key=lambda found: found[0])[1]
    rest = [solve(gram, target, first)[1] for gram, target in zip(gram_SKK[1:], target_SK[1:], strict=True)]
    theta_ST = np.array([first, *rest])
    return theta_ST, np.array([shape(theta) for theta in theta_ST])


def left_out(form: str, errors: Errors, start: Array | None, *, apart: bool = False) -> Array:
    """log E of each option as predicted by a fit to the others."""
    predicted_MK = np.full_like(errors.log_MK, np.nan)
    for k in range(errors.log_MK.shape[1]):
        rest_MK = errors.log_MK.copy()
        rest_MK[:, k] = np.nan
        seen = np.isfinite(rest_MK).any(axis=1) & np.isfinite(errors.log_MK[:, k])
        if seen.any():
            uniform = np.ones((1, int(seen.sum())))
            fitted = fit_law(form, replace(errors, log_MK=rest_MK[seen]), uniform, start=start, apart=apart)
            predicted_MK[seen, k] = fitted.log_MK[:, k]
    return predicted_MK
