"""Rank versus bits: predicted cost by width and bytes, and what the plans with and without rank measure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, MultipleLocator

from bitalloc.figures.style import GREY, INK, LIGHT, headline, page

COLUMNS = 4  # panels side by side
PANEL, BESIDE = 2.5, 3.6  # inches: height of a panel, and width of what is measured
MARKERS = ("o", "^", "s", "D", "v", "P")


def phase(frame: pd.DataFrame, controls: pd.DataFrame, path: Path, stamp: str, *, model: str) -> None:
    """PHASE and CONTROLS -> PNG: a panel for each shape, and beside them joint against bits only, as measured."""
    shapes = frame[frame["scope"] == "shape"].drop_duplicates("name").sort_values(["kind", "width", "rows"])
    names = shapes["name"].tolist()
    rows, columns = -(-len(names) // COLUMNS), min(COLUMNS, len(names))
    width, height = 13.5, PANEL * rows + 2.0
    footer = (
        f"{model}: predicted KL (coefficient x relative error) of the options that were swept, bytes shared between "
        "matrices alike; nothing extrapolated. Thin lines: single matrices; band: 95 % bootstrap over matrices of a "
        "shape; dotted: budgets. Without a line, no code of that size was swept. "
        f"Right: the plan of all options against that of rank 0, 95 % bootstrap over report windows, paired. {stamp}"
    )
    with page(width, height, path) as figure:
        bottom, top = headline(figure, sentence(frame, controls), footer)
        bottom, top = bottom + 0.5 / height, top - 0.35 / height
        right = 1 - BESIDE / width
        grid = figure.add_gridspec(
            rows, columns, left=0.062, right=right, bottom=bottom, top=top, wspace=0.13, hspace=0.42
        )
        shared = None
        for place, name in enumerate(names):
            axes = shared = figure.add_subplot(grid[divmod(place, columns)], sharey=shared)
            _savings(axes, frame, name, last=place + columns >= len(names))
            axes.tick_params(labelleft=place % columns == 0)
            if place % columns == 0:
                axes.set_ylabel("KL that offering rank saves,\npredicted, at equal bytes, %")
        left = right + 1.0 / width
        _measured(figure.add_axes((left, bottom, 0.985 - left, top - bottom)), controls)


def sentence(frame: pd.DataFrame, controls: pd.DataFrame) -> str:
    """What the page says, the negative first: matrices in which rank wins, and what the plans measure."""
    at = frame[(frame["scope"] == "matrix") & (frame["budget"] != "")]
    if at.empty:
        at = frame[frame["scope"] == "matrix"].assign(budget="any level of the grid")
    won = [int((part["winner"] == "rank").sum()) for _, part in at.groupby("budget", sort=False)]
    budgets, count = list(dict.fromkeys(at["budget"])), at["name"].nunique()
    said = f"rank is predicted to save 2 % of KL or more in {_listed(won)} of {count} matrices at {_listed(budgets)}"
    paired = _against_bits(controls)
    if paired.empty:
        return said[0].upper() + said[1:]
    lower, higher = int((paired["hi"] < 0).sum()), int((paired["lo"] > 0).sum())
    measured = f"measured KL with it is below that of bits alone in {lower} of {len(paired)} cases, above in {higher}"
    opening = "No consistent gain from rank at equal bytes"
    if max(lower, higher) == lower + higher and 2 * (lower + higher) >= len(paired):
        opening = f"Rank {'pays' if lower else 'costs'} at equal bytes"
    return f"{opening}: {measured}; {said}"


def _listed(words: list) -> str:
    text = [str(word) for word in words]
    return text[0] if len(text) == 1 else f"{', '.join(text[:-1])} and {text[-1]}"


def _against_bits(controls: pd.DataFrame) -> pd.DataFrame:
    rows = controls[(controls["control"] == "bits_only") & (controls["metric"] == "kl_nats_per_token")]
    return rows[rows["value"].notna()]


def _savings(axes: Axes, frame: pd.DataFrame, name: str, *, last: bool) -> None:
    grid = frame[frame["budget"] == ""]
    shape = grid[(grid["scope"] == "shape") & (grid["name"] == name)].sort_values("bits_per_weight")
    first, x = shape.iloc[0], shape["bits_per_weight"]
    alike = grid[(grid["scope"] == "matrix") & (grid["kind"] == first["kind"])]
    alike = alike[(alike["rows"] == first["rows"]) & (alike["columns"] == first["columns"])]
    for _, line in alike.groupby("name", sort=False):
        axes.plot(line["bits_per_weight"], 100 * line["saved"], color=LIGHT, lw=0.6, zorder=1)
    ends = (100 * shape[end].astype(float) for end in ("saved_lo", "saved_hi"))
    axes.fill_between(x, *ends, color="#d0d0d0", lw=0, zorder=2, alpha=0.8)
    axes.plot(x, 100 * shape["saved"], color=INK, lw=1.7, zorder=3)
    for level in frame.loc[frame["budget"] != "", "bits_per_weight"].unique():
        axes.axvline(level, color=GREY, lw=0.8, ls=(0, (1, 3)), zorder=0)
    axes.set_ylim(0, max(5.0, 105 * frame["saved"].max()))
    axes.set_xlim(grid["bits_per_weight"].min(), grid["bits_per_weight"].max())
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.xaxis.set_minor_locator(MultipleLocator(0.25))
    axes.set_title(f"{name}, width {first['width']}", size=8.5)
    if last:
        axes.set_xlabel("bits a weight, everything counted")


def _measured(axes: Axes, controls: pd.DataFrame) -> None:
    """KL of the joint plan less that of bits alone, in per cent of the latter, by budget and corpus."""
    rows = _against_bits(controls)
    budgets, tasks = list(dict.fromkeys(controls["budget"])), list(dict.fromkeys(rows["task"]))
    axes.axvline(0, color=GREY, lw=0.8)
    for y, budget in enumerate(budgets):
        mine = rows[rows["budget"] == budget]
        for row in mine.itertuples():
            place = tasks.index(row.task)
            at = y + (place - (len(tasks) - 1) / 2) * 0.6 / max(1, len(tasks))
            lo, value, hi = (100 * end / row.alone for end in (row.lo, row.value, row.hi))
            axes.plot([lo, hi], [at, at], color=GREY, lw=1.1)
            axes.plot(value, at, MARKERS[place % len(MARKERS)], color=INK, mfc="white", ms=5)
            if y == 0:
                axes.annotate(
                    row.task.removesuffix("/report"), (max(hi, 0), at), (4, 0), textcoords="offset points", size=7.5,
                    va="center", color=GREY,
                )  # fmt: skip
        if mine.empty:
            missing = controls[(controls["budget"] == budget) & (controls["control"] == "bits_only")]["status"]
            said = missing.iloc[0].partition(":")[0] if len(missing) else "no plan"
            axes.annotate(said, (0, y), (4, 4), textcoords="offset points", size=7.5, color=GREY, style="italic")
    axes.set_yticks(range(len(budgets)), budgets)
    axes.set_ylim(len(budgets) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    reach = max(1.0, *(abs(end) for end in axes.get_xlim()))
    axes.set_xlim(-reach, 1.25 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("KL, % of that of bits alone\n\u2190 rank better        bits better \u2192")
    axes.set_title("Measured")
