"""Does the cheap error of the sweep rank options as learned rounding does? Block by block, swept and learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from bitalloc.figures.style import GREY, INK, LIGHT, headline, page
from bitalloc.statistics import spearman

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "h")
RESAMPLES = 2000


def tune(options: pd.DataFrame, path: Path, stamp: str, *, model: str, seed: int) -> None:
    """TUNED_OPTIONS -> PNG: the error of the learned block against the mean error of its matrices in the sweep."""
    rho, low, high = agreement(options, seed=seed)
    left = np.exp(np.log(options["block_error_learned"] / options["block_error_swept"]).mean())
    idle = int((options["block_error_learned"] >= options["block_error_swept"]).sum())
    how = "as learned rounding does" if low > 0.9 else "like learned rounding only in part"
    sentence = f"The sweep's errors rank options {how}: Spearman {rho:.3f} [{low:.3f}, {high:.3f}]"
    footer = (
        f"{model}: {len(options)} pairs of a block and an option, drawn at random; all matrices of the block at the "
        "option, inputs of the original model, held-out calibrate windows. Spearman's rho of errors over the geometric "
        f"mean of their block; 95 % bootstrap over pairs. Learning leaves {left:.2f} of the block's error (geometric "
        f"mean), and all of it in {idle} pairs. {stamp}"
    )
    with page(8.0, 5.4, path) as figure:
        bottom, top = headline(figure, sentence, footer)
        axes = figure.add_axes((0.1, bottom + 0.1, 0.72, top - bottom - 0.13))
        for block, part in options.groupby("block"):
            x, marker = part["rel_error"], MARKERS[int(block) % len(MARKERS)]
            axes.vlines(x, part["block_error_learned"], part["block_error_swept"], color=LIGHT, lw=0.8, zorder=1)
            style = {"marker": marker, "s": 26, "lw": 0.9, "zorder": 2}
            axes.scatter(x, part["block_error_swept"], facecolors="white", edgecolors=GREY, **style)
            axes.scatter(x, part["block_error_learned"], color=INK, label=f"block {block}", **style)
        axes.scatter([], [], facecolors="white", edgecolors=GREY, s=26, label="hollow: swept")
        axes.set(xscale="log", yscale="log", xlabel="error in the sweep, mean over the block's matrices (energy ratio)")
        axes.set_ylabel("error of the block's output (energy ratio)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handletextpad=0.2)


def agreement(options: pd.DataFrame, *, seed: int) -> tuple[float, float, float]:
    """Spearman's rho between errors in the sweep and of learned blocks, each over its block's geometric mean; 95 %.

    >>> errors = [0.1, 0.2, 0.4, 1.0, 2.0, 4.0]
    >>> frame = pd.DataFrame({"block": [0, 0, 0, 1, 1, 1], "rel_error": errors, "block_error_learned": errors})
    >>> [round(value, 3) for value in agreement(frame, seed=0)]
    [1.0, 1.0, 1.0]
    """
    columns = np.log(options[["rel_error", "block_error_learned"]])
    centred = columns - columns.groupby(options["block"].to_numpy()).transform("mean")
    x_P, y_P = centred.to_numpy().T.round(12)
    draw_RP = np.random.default_rng([seed, *b"tune"]).integers(len(x_P), size=(RESAMPLES, len(x_P)))
    low, high = np.nanquantile(spearman(x_P[draw_RP], y_P[draw_RP]), [0.025, 0.975])
    return float(spearman(x_P[None], y_P[None])[0]), float(low), float(high)
