"""What the ranks that were not swept would cost, anchored at the measured ranks of each matrix.

Legend: M matrices, X the ranks swept at one (quantizer, group size, bits).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.laws.data import MATRIX, OPTION, Array, Errors, patterns, read_errors
from bitalloc.laws.forms import DECAY, rank_shape
from bitalloc.laws.surface import INTERPOLATION, along, between, monotone
from bitalloc.option import from_row


def extra_rows(
    sweep: pd.DataFrame, sizes: pd.DataFrame, law: pd.DataFrame, *, ranks: list[int], stored: Sweep, form: str
) -> pd.DataFrame:
    """Rows of COSTS for `ranks`, in no order; `sizes` has `rows` and `columns` by layer."""
    errors = read_errors(sweep)
    if errors.options["rank"].nunique() < 2:
        raise BitallocError("fit.extra_ranks needs two swept ranks at least; add one to sweep.ranks, or set it to []")
    if form == INTERPOLATION:
        known, shapes, source = monotone(errors), None, INTERPOLATION
    else:
        known, shapes, source = errors.log_MK, _layer_parameters(law, form, list(errors.matrices.index)), "law"
    found = []
    for option, members, log_M in _extra(errors, known, shapes, form, ranks):
        matrices = errors.matrices.iloc[members].join(sizes)
        fits = (option["rank"] <= matrices[["rows", "columns"]].min(axis=1)).to_numpy()
        shapes_OI = zip(matrices["rows"], matrices["columns"], strict=True)
        nbytes = [from_row(option, stored).nbytes(int(rows), int(columns)) for rows, columns in shapes_OI]
        frame = matrices.assign(**option, nbytes=nbytes, rel_error=np.exp(log_M), source=source)
        found.append(frame[fits].rename_axis("layer").reset_index())
    columns = ["layer", *MATRIX, *OPTION, "nbytes", "rel_error", "source"]
    rows = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
    return rows.assign(model=sweep["model"].iloc[0])


def _layer_parameters(law: pd.DataFrame, form: str, layers: list[str]) -> Mapping[str, Array]:
    """beta, gamma and the decay of each layer from LAW; the pooled value where a layer has none."""
    names = ["beta", *(["gamma"] if form == "additive" else []), DECAY[form]]
    rows = law[(law["form"] == form) & law["statistic"].isin(names)]
    wide = rows.pivot(index="scope", columns="statistic", values="value").reindex([*layers, "pooled"], columns=names)
    wide = wide.fillna(wide.loc["pooled"])
    if wide[DECAY[form]].isna().any():
        raise BitallocError(f"the law table has no {DECAY[form]} of the form {form!r} for this sweep; rerun fit")
    return {name: wide[name].to_numpy(float)[:-1, None] for name in names}


def _extra(
    errors: Errors, known_MK: Array, shapes: Mapping[str, Array] | None, form: str, ranks: list[int]
) -> Iterator[tuple[dict, NDArray[np.intp], Array]]:
    """(option, members_M, log E_M) of every rank that a (quantizer, group size, bits) row does not have."""
    by_rank = errors.options.sort_values("rank")
    for (quantizer, group, bits), row in by_rank.groupby(["quantizer", "group_size", "bits"], sort=False):
        for mask, members in patterns(np.isfinite(errors.log_MK[:, row.index])):
            swept = row["rank"].to_numpy(float)[mask]
            if not len(swept):
                continue
            x, places = np.log1p(swept), row.index[mask]
            measured, known = errors.log_MK[np.ix_(members, places)], known_MK[np.ix_(members, places)]
            for rank in sorted(set(ranks) - set(swept.astype(int))):
                at = float(np.log1p(rank))
                if shapes is None:
                    guess = along(x, known, at)
                else:
                    own = {name: values[members] for name, values in shapes.items()}
                    shape = rank_shape(form, own, float(bits), np.append(swept, rank))
                    guess = shape[:, -1] + between(x, known - shape[:, :-1], at)
                option = {"quantizer": quantizer, "bits": int(bits), "group_size": int(group), "rank": rank}
                yield option, members, _clamp(x, measured, at, guess)


def _clamp(x: Array, measured_MX: Array, at: float, guess_M: Array) -> Array:
    """Between the errors of the neighbouring measured ranks, which noise may have put in either order."""
    j = int(np.searchsorted(x, at))
    lower = measured_MX[:, j] if j < len(x) else np.full(len(guess_M), -np.inf)
    upper = measured_MX[:, j - 1] if j else np.full(len(guess_M), np.inf)
    return np.clip(guess_M, np.minimum(lower, upper), np.maximum(lower, upper))
