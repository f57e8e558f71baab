"""Rows of LAW: estimates with their bootstrap intervals, and how well predictions agree with measurements.

Legend: M matrices, K options, S weightings of the matrices (the first is uniform), X any columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitalloc.laws.data import Array, Errors

Compared = Mapping[str, tuple[Array, Array]]  # goodness -> (truth, guess)


def law_row(form: str, scope: str, statistic: str, draws: Array, n: int) -> dict:
    """A row of LAW from the estimate (first) and its bootstrap draws."""
    finite = draws[1:][np.isfinite(draws[1:])]
    lo, hi = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    value = float(draws[0])
    place = {"form": form, "scope": scope, "statistic": statistic}
    return place | {"value": value, "lo": float(lo), "hi": float(hi), "n": n if np.isfinite(value) else 0}


def goodness(form: str, scope: str, compared: Compared, weights_SM: Array) -> list[dict]:
    """The rows of a scope; n counts matrices."""
    rows = []
    for name, (truth, guess) in compared.items():
        n = int((np.isfinite(truth) & np.isfinite(guess)).any(axis=1).sum())
        rows.append(law_row(form, scope, name, r2(truth, guess, weights_SM), n))
    measured, fitted = compared["r2_log"]
    each = r2(measured, fitted, np.eye(len(measured)))
    worst = np.min(each, where=np.isfinite(each), initial=np.inf) if np.isfinite(each).any() else np.nan
    rows.append(law_row(form, scope, "r2_worst", np.array([worst]), len(measured)))
    missed = 100 * np.abs(np.expm1(fitted - measured))
    return [*rows, law_row(form, scope, "median_ape_percent", np.array([_median(missed)]), len(measured))]


def goodness_by_layer(form: str, errors: Errors, compared: Compared, parameters: Mapping[str, Array]) -> list[dict]:
    """The rows of each layer; n counts options. No intervals: there is one matrix to resample."""
    count_M = np.isfinite(errors.log_MK).sum(axis=1)
    found = {name: (values, count_M) for name, values in parameters.items()}
    for name, (truth, guess) in compared.items():
        seen = np.isfinite(truth) & np.isfinite(guess)
        found[name] = (r2(truth, guess, np.eye(len(truth))), seen.sum(axis=1))
    measured, fitted = compared["r2_log"]
    missed = 100 * np.abs(np.expm1(fitted - measured))
    found["median_ape_percent"] = (np.array([_median(row) for row in missed]), count_M)
    return [
        law_row(form, layer, name, values[i : i + 1], int(n[i]))
        for i, layer in enumerate(errors.matrices.index)
        for name, (values, n) in found.items()
    ]


def r2(truth_MX: Array, guess_MX: Array, weights_SM: Array) -> Array:
    """1 - sum (truth - guess)^2 / sum (truth - mean truth)^2 for each weighting; NaN where nothing varies.

    >>> truth, guess = np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([[1.0, 2.0], [2.0, 9.0]])
    >>> r2(truth, guess, weights_SM=np.array([[1.0, 1.0], [2.0, 0.0]]))
    array([0.5, 1. ])
    """
    seen = np.isfinite(truth_MX) & np.isfinite(guess_MX)
    truth, lost = np.where(seen, truth_MX, 0), np.where(seen, truth_MX - guess_MX, 0)
    count = seen.sum(axis=1)
    mean = truth.sum(axis=1) / np.maximum(count, 1)
    # matrices differ in scale by orders of magnitude, so the sums are taken about each one's own mean
    within = (np.where(seen, truth - mean[:, None], 0) ** 2).sum(axis=1)
    n, first, second, within, lost = (
        weights_SM @ x for x in (count, count * mean, count * mean**2, within, (lost**2).sum(axis=1))
    )
    total = within + np.maximum(second - first**2 / np.maximum(n, 1), 0)
    varies = total > 1e-12 * (within + second)
    return np.where(varies, 1 - lost / np.where(varies, total, 1), np.nan)


def _median(values: Array) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")
