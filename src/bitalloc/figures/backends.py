"""Simulated against real: KL and PPL of one plan in every backend, beside what the dequantised weights score."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bitalloc.figures.style import GREY, INK, headline, page

REFERENCE, SIMULATED, BASELINE = "reference", "dequantised", "_int8"  # the last is the end of a name
ROW, GAP = 0.235, 1.4  # inches; rows between plans
WIDTH, LEFT, RIGHT = 13.5, 1.75, 2.15  # inches
METRICS = {"kl_nats_per_token": "KL to the unquantised model,\nnats a token", "ppl": "perplexity"}


def backends(frame: pd.DataFrame, path: Path, stamp: str, *, model: str) -> None:
    """BACKENDS -> PNG: one line a backend, a panel for each corpus and metric; grey band: the simulated interval."""
    frame = frame[frame["backend"] != REFERENCE]
    names = {plan: list(dict.fromkeys(part["backend"])) for plan, part in frame.groupby("plan", sort=False)}
    places, y = {}, 0.0
    for plan, members in names.items():
        places |= {(plan, name): y + place for place, name in enumerate(members)}
        y += len(members) + GAP
    height = ROW * y + 2.1
    footer = (
        f"{model}: report windows of the evaluation, 95 % bootstrap intervals over windows. Band: the interval of the "
        "dequantised weights, which sweep and evaluation score. Open: every planned matrix at 8 bits, whatever the "
        "plan says; torchao and bitsandbytes round the original weights themselves. Logit difference: largest to the "
        f"dequantised weights, as a share of the largest logit. {stamp}"
    )
    with page(WIDTH, height, path) as figure:
        bottom, top = headline(figure, message(frame), footer)
        tasks = list(dict.fromkeys(frame["task"]))
        panels = [(metric, task) for metric in METRICS for task in tasks]
        grid = figure.add_gridspec(
            1, len(panels), left=LEFT / WIDTH, right=1 - RIGHT / WIDTH, bottom=bottom + 0.5 / height,
            top=top - 0.3 / height, wspace=0.12,
        )  # fmt: skip
        for column, (metric, task) in enumerate(panels):
            axes = figure.add_subplot(grid[column])
            _panel(axes, frame[frame["task"] == task].set_index(["plan", "backend"]), metric, places)
            axes.set_title(f"{metric.partition('_')[0].upper()}, {task.removesuffix('/report')}")
            axes.set_xlabel(METRICS[metric])
            axes.set_ylim(y - GAP - 0.3, -0.7)
        _beside(figure.axes, frame, places)


def message(frame: pd.DataFrame) -> str:
    """What the page says: by how much the KL of each real backend departs from the simulated one.

    >>> rows = [("p", "dequantised", 0.2), ("p", "native", 0.2), ("p", "gguf", 0.21), ("p", "gptq", None)]
    >>> message(pd.DataFrame(rows, columns=["plan", "backend", "kl_nats_per_token"]))
    'KL in real backends against the simulated one: native +0.0 %, gguf +5.0 % (p)'
    """
    kl = frame.groupby(["plan", "backend"], sort=False)["kl_nats_per_token"].mean().dropna()
    parts = []
    for plan in dict.fromkeys(frame["plan"]):
        real = [
            f"{name} {100 * (value / kl[plan, SIMULATED] - 1) + 0.0:+.1f} %".replace("-0.0 ", "+0.0 ")
            for (of, name), value in kl.items()
            if of == plan and (plan, SIMULATED) in kl.index and name != SIMULATED and not name.endswith(BASELINE)
        ]
        parts += [f"{', '.join(real)} ({plan})"] if real else []
    if not parts:
        return "No real backend ran beside the simulated weights"
    return f"KL in real backends against the simulated one: {'; '.join(parts)}"


def _panel(axes: Axes, rows: pd.DataFrame, metric: str, places: dict[tuple[str, str], float]) -> None:
    short = metric.removesuffix("_nats_per_token")
    for (plan, name), y in places.items():
        if (plan, name) not in rows.index or not np.isfinite((row := rows.loc[(plan, name)])[metric]):
            continue
        lo, hi = row[f"{short}_lo"], row[f"{short}_hi"]
        if name == SIMULATED:
            last = max(place for (of, _), place in places.items() if of == plan)
            axes.fill_betweenx([y - 0.45, last + 0.45], lo, hi, color="#e6e6e6", lw=0, zorder=0)
            axes.plot([row[metric]] * 2, [y - 0.45, last + 0.45], color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=1)
        axes.plot([lo, hi], [y, y], color=INK, lw=1.1, solid_capstyle="butt", zorder=2)
        shape, fill = "D" if name == SIMULATED else "o", "white" if name.endswith(BASELINE) else INK
        axes.plot(row[metric], y, shape, ms=4.5, color=INK, mfc=fill, zorder=3, clip_on=False)
    if metric.startswith("kl"):
        axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="x", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _beside(panels: list[Axes], frame: pd.DataFrame, places: dict[tuple[str, str], float]) -> None:
    """Names left of the panels, what was not measured and why across them, differences and sizes right of them."""
    first, last = panels[0], panels[-1]
    first.set_zorder(1)  # what is written across the panels lies above them all
    first.patch.set_visible(False)
    inches = last.get_position().x1 - first.get_position().x0
    letters = int(inches * WIDTH * 72 / (0.5 * 7))
    rows = frame.drop_duplicates(["plan", "backend"]).set_index(["plan", "backend"])
    for plan in dict.fromkeys(plan for plan, _ in places):
        top = min(y for (of, _), y in places.items() if of == plan)
        _text(first, plan, (0, top - 0.85), -(LEFT - 0.3) * 72, "left", weight="bold")
    for title, offset in (("logit difference", 80), ("weights, kB", 145)):
        _text(last, title, (1, -0.85), offset, "right", color=GREY)
    for (plan, name), y in places.items():
        row = rows.loc[(plan, name)]
        _text(first, name.replace("_", " "), (0, y), -8, "right")
        if not np.isfinite(row["max_logit_difference"]):
            why, box = textwrap.shorten(row["status"], letters, placeholder=" ..."), {"facecolor": "white", "lw": 0}
            _text(first, why, (0, y), 4, "left", style="italic", color=GREY, size=7, bbox={**box, "pad": 1.5})
            continue
        if not name.endswith(BASELINE):
            _text(last, f"{row['max_logit_difference']:.2g}", (1, y), 80, "right")
        _text(last, f"{row['nbytes'] / 1000:,.0f} {row['held']}", (1, y), 145, "right")


def _text(axes: Axes, text: str, at: tuple[float, float], offset: float, align: str, **how: object) -> None:
    """Text beside (share of the width, row), `offset` points from there."""
    axes.annotate(
        text, at, (offset, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", ha=align,
        annotation_clip=False, **{"size": 7.5, "color": INK, **how},
    )  # fmt: skip
