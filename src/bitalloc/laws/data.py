"""The errors of a sweep as one array, and the groups of matrices that are fitted and resampled together.

Legend: M matrices, K options, C cells (quantizer, group size) but the first, S weightings of the matrices, X any
columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bitalloc.errors import BitallocError

Array = NDArray[np.float64]

OPTION = ["quantizer", "bits", "group_size", "rank"]
MATRIX = ["block", "role", "kind"]
KINDS, THIRDS = ("attention", "mlp"), ("early", "middle", "late")


@dataclass(frozen=True)
class Errors:
    matrices: pd.DataFrame  # layer -> block, role, kind
    options: pd.DataFrame  # OPTION
    log_MK: Array  # log rel_error, NaN where not swept
    bits_K: Array
    rank_K: Array
    cells_KC: Array  # 1 where the option is of the cell
    cells: list[str]  # e.g. gptq_g64

    def of(self, scope: str) -> NDArray[np.bool_]:
        """Which matrices belong to a scope."""
        if scope == "pooled":
            return np.ones(len(self.matrices), bool)
        if scope in KINDS:
            return (self.matrices["kind"] == scope).to_numpy()
        block = self.matrices["block"].to_numpy()
        return block * 3 // (block.max() + 1) == THIRDS.index(scope)

    def rank_effect(self, log_MK: Array, zero_MK: Array) -> Array:
        """log E(b,r) of the first - log E(b,0) of the second, for the options with r > 0."""
        keys = [tuple(option) for option in self.options.to_numpy()]
        base = {key[:3]: place for place, key in enumerate(keys) if key[3] == 0}
        pairs = [(place, base[key[:3]]) for place, key in enumerate(keys) if key[3] and key[:3] in base]
        ranked, zero = np.array(pairs, int).reshape(-1, 2).T
        return log_MK[:, ranked] - zero_MK[:, zero]

    def compare(self, fitted_MK: Array, out_MK: Array, rank_MX: Array) -> dict[str, tuple[Array, Array]]:
        """Goodness -> (truth, guess), from predictions in sample, left out, and of the rank effect."""
        return {
            "r2_log": (self.log_MK, fitted_MK),
            "r2_linear": (np.exp(self.log_MK), np.exp(fitted_MK)),
            "r2_loo": (self.log_MK, out_MK),
            "r2_rank": (self.rank_effect(self.log_MK, self.log_MK), rank_MX),
        }


def read_errors(sweep: pd.DataFrame) -> Errors:
    """The quantised options of a SWEEP frame. Raises `BitallocError` for what no law can be fitted to."""
    swept = sweep[sweep["bits"] < 16]
    if swept.empty:
        raise BitallocError("the sweep holds no quantised option; set sweep.bits below 16 and run the sweep")
    error = swept["rel_error"].to_numpy(float)
    wrong = swept[~(np.isfinite(error) & (error > 0))]
    if len(wrong):
        row = wrong.iloc[0]
        option = ", ".join(f"{name} {row[name]}" for name in OPTION)
        raise BitallocError(
            f"rel_error of {row['layer']} ({option}) is {row['rel_error']}, not a positive number, and so in "
            f"{len(wrong)} rows; delete the sweep's table and these shards, then rerun"
        )
    if swept.duplicated(["layer", *OPTION]).any():
        raise BitallocError("the sweep holds one option of a matrix twice; fit one model's sweep at a time")
    wide = swept.pivot(index="layer", columns=OPTION, values="rel_error")
    if wide.shape[1] < 2:
        raise BitallocError("one quantised option cannot show a law; add values to sweep.bits or sweep.ranks")
    matrices = swept.drop_duplicates("layer").set_index("layer")[MATRIX]
    options = wide.columns.to_frame(index=False)
    pairs = zip(options["quantizer"], options["group_size"], strict=True)
    each = [f"{quantizer}_g{group}" for quantizer, group in pairs]
    cells = list(dict.fromkeys(each))[1:]
    return Errors(
        matrices,
        options,
        log_MK=np.log(wide.loc[matrices.index].to_numpy(float)),
        bits_K=options["bits"].to_numpy(float),
        rank_K=options["rank"].to_numpy(float),
        cells_KC=np.array([[cell == name for name in cells] for cell in each], float).reshape(len(each), len(cells)),
        cells=cells,
    )


def scopes(errors: Errors) -> Iterator[tuple[str, Errors]]:
    """The groups of matrices that are fitted apart and are not empty."""
    for scope in ("pooled", *KINDS, *THIRDS):
        chosen = errors.of(scope)
        if chosen.any():
            yield scope, replace(errors, matrices=errors.matrices[chosen], log_MK=errors.log_MK[chosen])


def weights(errors: Errors, resamples: int, seed: list[int]) -> Array:
    """weights_SM: uniform, then how often each bootstrap resample draws each matrix."""
    n = len(errors.matrices)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples if n > 1 else 0)
    return np.vstack([np.ones(n), drawn])


def patterns(finite_MX: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.intp]]]:
    """Distinct rows of a mask, each with the matrices that have it: normally one, as a sweep is a full grid."""
    masks, member = np.unique(finite_MX, axis=0, return_inverse=True)
    for place, mask in enumerate(masks):
        yield mask, np.flatnonzero(member.ravel() == place)
