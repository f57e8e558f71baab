"""The error law: how a matrix's relative error falls with bits and rank, and what options not swept would cost.

For matrix i at b bits and rank r, with E the `rel_error` of SWEEP (an energy ratio, dimensionless):

    additive         E = s_i o_c (2^(-beta b) + gamma (r+1)^(-delta))
    multiplicative   E = s_i o_c  2^(-beta b) (r+1)^(-delta_i)
    exponential      E = s_i o_c  2^(-beta b) exp(-kappa_i r)
    interpolation    no formula: log E of one matrix, monotone in b and log(r+1)

All are fitted to log E by least squares. o_c is one factor for each cell c = (quantizer, group size), shared by
all matrices: over trained models that predicts left-out options as well as an o_c for each matrix, with far
fewer parameters. The amplitude that the additive law's first term might have is part of s_i. Scopes are fitted
apart: all matrices, a kind, a third of the depth, one layer (which then has its own beta, o_c and decay).

Intervals are 95 % bootstraps over matrices. Goodness resamples the fitted matrices without refitting.

Legend: M matrices, K options, T shared parameters, S weightings of the matrices (the first is uniform, the others
are bootstrap resamples).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from bitalloc import tables
from bitalloc.config import Fit, Sweep
from bitalloc.errors import BitallocError, nearest
from bitalloc.laws.data import Array, Errors, read_errors, scopes, weights
from bitalloc.laws.forms import DECAY, fit_law, gamma, left_out, told
from bitalloc.laws.goodness import goodness, goodness_by_layer, law_row
from bitalloc.laws.offers import extra_rows
from bitalloc.laws.surface import INTERPOLATION, interpolated

FORMS = (*DECAY, INTERPOLATION)


def law(sweep: pd.DataFrame, *, settings: Fit, seed: int) -> pd.DataFrame:
    """Fit every form to a SWEEP frame in every scope -> LAW frame.

    Statistics: the parameters `beta` (decay with bits: one bit divides E by 2^beta), `delta` or `kappa` (decay with
    rank; the mean over matrices where each has its own), `gamma`, `factor_<quantizer>_g<group>` (o_c relative to
    the first cell); `r2_log`, `r2_linear` (in sample), `r2_loo` (each option left out in turn, for all matrices at
    once), `r2_rank` (of log E(b,r) - log E(b,0) over r > 0), `r2_worst` (smallest `r2_log` of one matrix),
    `median_ape_percent`. For the interpolation, all of them are out of sample. What the options cannot tell is
    missing, with n = 0. `<parameter>_difference` compares the scopes `attention-mlp` and `early-late`.
    Raises `BitallocError` when the sweep is empty, holds an error that is not a positive number, or one option.
    """
    errors = read_errors(sweep)
    rows: list[dict] = []
    for form, decay in DECAY.items():
        draws: dict[str, dict[str, Array]] = {}
        for place, (scope, part) in enumerate(scopes(errors)):
            draws[scope] = _fit_scope(rows, form, scope, part, weights(part, settings.resamples, [seed, place]))
        for first, second in (("attention", "mlp"), ("early", "late")):
            if first in draws and second in draws:
                n = sum(int(errors.of(scope).sum()) for scope in (first, second))
                for name in ("beta", decay):
                    difference = draws[first][name] - draws[second][name]
                    rows.append(law_row(form, f"{first}-{second}", f"{name}_difference", difference, n))
        _fit_layers(rows, form, errors)
    _interpolation(rows, errors, settings.resamples, seed)
    return pd.DataFrame(rows, columns=tables.LAW.names)


def costs(
    sweep: pd.DataFrame, inventory: pd.DataFrame, law: pd.DataFrame, *, settings: Fit, stored: Sweep, form: str
) -> pd.DataFrame:
    """Every measured option of every matrix, and `settings.extra_ranks` as `form` predicts them -> COSTS frame.

    `form` is a law, whose parameters come from each layer's own rows of the LAW frame, or `interpolation`. The
    law gives only the shape between ranks: its log residual at the measured ranks on both sides is interpolated
    in log(r+1) and added (beyond the last rank: the nearest residual), so predictions pass through every measured
    point of the matrix. A prediction never lies outside the errors of the next lower and next higher measured
    ranks. Ranks that a matrix is too small for are not offered. `stored` says how factors are stored, for nbytes.
    Raises `BitallocError` for an unknown form, a matrix that the inventory does not claim, a LAW of another sweep,
    or extra ranks where fewer than two ranks were swept.
    """
    if form not in FORMS:
        raise BitallocError(f"unknown form {form!r}: {nearest(form, FORMS)}")
    claimed = inventory[inventory["claimed"]].set_index("layer")[["rows", "columns"]]
    absent = set(sweep["layer"]) - set(claimed.index)
    if absent:
        raise BitallocError(f"the inventory does not claim {min(absent)!r} of the sweep; rerun retrieve and sweep")
    columns = tables.COSTS.names
    found = [sweep.assign(source="measured")[columns]]
    if settings.extra_ranks:
        found.append(extra_rows(sweep, claimed, law, ranks=settings.extra_ranks, stored=stored, form=form)[columns])
    both = pd.concat([frame for frame in found if len(frame)], ignore_index=True)
    order = {layer: place for place, layer in enumerate(sweep["layer"].unique())}
    both = both.assign(order=both["layer"].map(order), last=both["bits"] >= 16)
    both = both.sort_values(["order", "last", "quantizer", "group_size", "bits", "rank"])
    return both[columns].reset_index(drop=True)


def residuals(sweep: pd.DataFrame, form: str) -> pd.DataFrame:
    """log E measured and predicted, for figures: `layer, block, role, kind`, the option, `log_error`,
    `log_predicted`, `residual` (measured - predicted, nats).

    Laws are pooled over all matrices and in sample; the interpolation leaves each option out.
    """
    if form not in FORMS:
        raise BitallocError(f"unknown form {form!r}: {nearest(form, FORMS)}")
    errors = read_errors(sweep)
    if form == INTERPOLATION:
        predicted_MK = interpolated(errors)
    else:
        predicted_MK = fit_law(form, errors, np.ones((1, len(errors.matrices)))).log_MK
    i, k = np.nonzero(np.isfinite(errors.log_MK))
    frame = pd.concat(
        [errors.matrices.reset_index().iloc[i].reset_index(drop=True), errors.options.iloc[k].reset_index(drop=True)],
        axis=1,
    )
    measured, predicted = errors.log_MK[i, k], predicted_MK[i, k]
    return frame.assign(log_error=measured, log_predicted=predicted, residual=measured - predicted)


def _fit_scope(rows: list[dict], form: str, scope: str, errors: Errors, weights_SM: Array) -> dict[str, Array]:
    """Append the rows of one scope; return the draws of beta and of the decay (first: the estimate)."""
    fitted = fit_law(form, errors, weights_SM)
    theta_ST, n = fitted.theta_ST, len(errors.matrices)
    draws = {"beta": theta_ST[:, 0]}
    if form == "additive":
        draws |= {"gamma": gamma(theta_ST[:, 1]), "delta": theta_ST[:, 2]}
    else:
        draws[DECAY[form]] = (fitted.own_SMP[:, :, 1] * weights_SM).sum(axis=1) / weights_SM.sum(axis=1)
    offsets = theta_ST[:, theta_ST.shape[1] - len(errors.cells) :]
    draws |= {f"factor_{name}": np.exp(offset) for name, offset in zip(errors.cells, offsets.T, strict=True)}
    draws = {name: draw if told(name, errors) else np.full_like(draw, np.nan) for name, draw in draws.items()}
    rows += [law_row(form, scope, name, draw, n) for name, draw in draws.items()]
    effect = errors.rank_effect(fitted.log_MK, fitted.log_MK)
    out_MK = left_out(form, errors, theta_ST[0] if form == "additive" else None)
    rows += goodness(form, scope, errors.compare(fitted.log_MK, out_MK, effect), weights_SM)
    return draws


def _fit_layers(rows: list[dict], form: str, errors: Errors) -> None:
    """Append each layer's own fit. The additive law is not left out layer by layer: thousands of nonlinear fits."""
    log_MK, uniform_SM = errors.log_MK, np.ones((1, len(errors.matrices)))
    if form == "additive":
        start = fit_law(form, errors, uniform_SM).theta_ST[0]
        each = [replace(errors, log_MK=row[None]) for row in log_MK]
        fits = [fit_law(form, one, np.ones((1, 1)), start=start) for one in each]
        theta_MT = np.array([fitted.theta_ST[0] for fitted in fits])
        parameters = {"beta": theta_MT[:, 0], "gamma": gamma(theta_MT[:, 1]), "delta": theta_MT[:, 2]}
        fitted_MK, out_MK = np.vstack([fitted.log_MK for fitted in fits]), np.full_like(log_MK, np.nan)
    else:
        fitted = fit_law(form, errors, uniform_SM, apart=True)
        parameters = {"beta": fitted.own_SMP[0, :, 2], DECAY[form]: fitted.own_SMP[0, :, 1]}
        fitted_MK, out_MK = fitted.log_MK, left_out(form, errors, None, apart=True)
    parameters = {name: values for name, values in parameters.items() if told(name, errors)}
    compared = errors.compare(fitted_MK, out_MK, errors.rank_effect(fitted_MK, fitted_MK))
    rows += goodness_by_layer(form, errors, compared, parameters)


def _interpolation(rows: list[dict], errors: Errors, resamples: int, seed: int) -> None:
    predicted_MK = interpolated(errors)
    for place, (scope, part) in enumerate(scopes(errors)):
        guess = predicted_MK[errors.of(scope)]
        compared = part.compare(guess, guess, part.rank_effect(guess, part.log_MK))
        rows += goodness(INTERPOLATION, scope, compared, weights(part, resamples, [seed, place]))
    compared = errors.compare(predicted_MK, predicted_MK, errors.rank_effect(predicted_MK, errors.log_MK))
    rows += goodness_by_layer(INTERPOLATION, errors, compared, {})
