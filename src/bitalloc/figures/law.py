"""How well a law describes the errors: predicted against measured, residuals by option, R^2 of every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from bitalloc.figures.style import GREY, INK, LIGHT, OPTION, headline, option_names, page

GOODNESS = {"r2_log": ("o", "in sample"), "r2_loo": ("D", "left out"), "r2_rank": ("^", "rank effect")}
KINDS = {"attention": ("o", "#0072b2"), "mlp": ("^", "#d55e00")}


def law(residuals: pd.DataFrame, law: pd.DataFrame, form: str, path: Path, stamp: str) -> None:
    """Residuals (layer, kind, the option, log_error, log_predicted, residual) of `form` and LAW -> PNG."""
    pooled = law[law["scope"] == "pooled"].set_index(["form", "statistic"])["value"]
    known = {name: pooled.get((form, name), np.nan) for name in GOODNESS}
    sentence = (
        f"The {form} law: R\u00b2 of log error {known['r2_log']:.3f} in sample, {known['r2_loo']:.3f} with each option "
        f"left out, {known['r2_rank']:.2f} for the effect of rank"
    )
    options = residuals.groupby(OPTION, sort=True).size().index
    height = max(4.6, 0.16 * len(options) + 1.9)
    footer = (
        f"{residuals['layer'].nunique()} matrices, {len(options)} options; residual = log measured - log predicted, "
        f"bars span 5 to 95 % of the matrices. {stamp}"
    )
    with page(13.5, height, path) as figure:
        bottom, top = headline(figure, sentence, footer)
        bottom, top = bottom + 0.5 / height, top - 0.4 / height
        grid = figure.add_gridspec(
            1, 3, left=0.06, right=0.91, bottom=bottom, top=top, wspace=0.38, width_ratios=[1.1, 1.2, 0.9]
        )
        _agreement(figure.add_subplot(grid[0]), residuals)
        _residuals(figure.add_subplot(grid[1]), residuals)
        _goodness(figure.add_subplot(grid[2]), law)


def _agreement(axes: Axes, residuals: pd.DataFrame) -> None:
    measured, predicted = np.exp(residuals["log_error"]), np.exp(residuals["log_predicted"])
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axes.plot(ends, ends, color=GREY, lw=0.8, zorder=0)
    for kind, (marker, colour) in KINDS.items():
        at = residuals["kind"] == kind
        axes.scatter(
            measured[at], predicted[at], s=9, marker=marker, facecolors="none", edgecolors=colour, lw=0.6, alpha=0.7,
            label=kind,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="measured relative error", ylabel="predicted relative error")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=8))
    axes.legend(frameon=False, loc="upper left", handletextpad=0.1, borderpad=0)
    axes.set_title("Every matrix and option")


def _residuals(axes: Axes, residuals: pd.DataFrame) -> None:
    axes.axvline(0, color=GREY, lw=0.8)
    parts = residuals.groupby(OPTION, sort=True)["residual"]
    for y, (_, part) in enumerate(parts):
        low, middle, high = np.quantile(part, [0.05, 0.5, 0.95])
        axes.plot([low, high], [y, y], color=LIGHT, lw=4, solid_capstyle="butt", zorder=1)
        axes.plot(middle, y, "o", color=INK, ms=4, zorder=2)
    axes.set_yticks(range(len(parts)), option_names(parts.size().index), size=7)
    axes.set_ylim(len(parts) - 0.3, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("residual, nats of log error (0.1 = 10 %)")
    axes.set_title("Residuals by option (dot: median)")


def _goodness(axes: Axes, law: pd.DataFrame) -> None:
    pooled = law[(law["scope"] == "pooled") & law["statistic"].isin(GOODNESS)]
    forms = list(dict.fromkeys(pooled["form"]))
    lowest = float(np.nanmin(pooled["value"], initial=0.0))
    axes.axvline(1, color=GREY, lw=0.8)
    for y, form in enumerate(forms):
        for shift, (statistic, (marker, _)) in zip((-0.22, 0, 0.22), GOODNESS.items(), strict=True):
            for row in pooled[(pooled["form"] == form) & (pooled["statistic"] == statistic)].itertuples():
                if np.isfinite(row.value):
                    axes.plot([row.lo, row.hi], [y + shift] * 2, color=GREY, lw=1)
                    axes.plot(row.value, y + shift, marker, color=INK, mfc="white", ms=5)
                    axes.annotate(
                        f"{GOODNESS[statistic][1]} {row.value:.2f}", (1.04, y + shift),
                        xycoords=("axes fraction", "data"), size=7, va="center", annotation_clip=False,
                    )  # fmt: skip
    axes.set_yticks(range(len(forms)), forms)
    axes.set_ylim(len(forms) - 0.5, -0.5)
    axes.set_xlim(lowest - 0.05, 1.03)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("R\u00b2, pooled over matrices")
    axes.set_title("Goodness of each form")
