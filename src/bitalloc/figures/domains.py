"""Where the damage falls: loss above the reference on every report corpus, and whether a plan's lead holds there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bitalloc.figures.style import GREY, INK, headline, mark, page
from bitalloc.tables import without_arms

UNIFORM, BEST = "uniform", "best"
LINE, GAP = 0.26, 0.85  # inches of an estimate, and between the rows of panels


def domains(  # noqa: PLR0917 - three tables, what was calibrated on, and where to put it
    plans: pd.DataFrame,
    checkpoints: pd.DataFrame,
    goodhart: pd.DataFrame,
    calibrated: Sequence[str],
    path: Path,
    stamp: str,
    *,
    model: str,
) -> None:
    """PLANS, CHECKPOINTS and GOODHART -> PNG: the strategies that became checkpoints, and uniform.

    `calibrated` names the corpora that moments were measured on. Above: nats a token above the reference; below: PPL
    against uniform at equal bytes. All intervals are those of GOODHART, paired over windows.
    """
    data = _Data(plans, checkpoints, goodhart, calibrated)
    upper = LINE * len(data.corpora) * (len(data.strategies) + 0.8) + 0.6
    lower = LINE * len(data.corpora) * (len(data.rivals) + 0.8) + 0.6 if data.rivals else 0.0
    height = upper + lower + 1.9
    footer = (
        f"{model}: report split; lines are 95 % intervals, bootstrap over windows, plan and rival on the same windows. "
        "A case is a corpus at one budget; it is told where the whole interval lies on one side. "
        f"Calibrated on {', '.join(calibrated)}. {stamp}"
    )
    with page(13.5, height, path) as figure:
        bottom, top = headline(figure, data.sentence(), footer)
        bottom, top = bottom + 0.55 / height, top - 0.4 / height
        ratios = [upper, lower] if lower else [upper]
        grid = figure.add_gridspec(
            len(ratios), len(data.budgets), left=0.12, right=0.975, bottom=bottom, top=top, wspace=0.07,
            hspace=len(ratios) * GAP / (height * (top - bottom) - (len(ratios) - 1) * GAP), height_ratios=ratios,
        )  # fmt: skip
        _names(_row(figure, grid, 0, data, _damage)[0], data)
        if lower:
            _row(figure, grid, 1, data, _lead)


class _Data:
    """Rows of GOODHART by (strategy, budget, corpus), and the orders in which they are drawn."""

    def __init__(
        self, plans: pd.DataFrame, checkpoints: pd.DataFrame, goodhart: pd.DataFrame, calibrated: Sequence[str]
    ) -> None:
        ours = plans["plan"].isin(checkpoints["plan"]) | (plans["strategy"] == UNIFORM)
        self.strategies = list(dict.fromkeys(plans.loc[ours, "strategy"]))
        rows = goodhart[(goodhart["analysis"] == "gain") & goodhart["proxy"].isin(self.strategies)]
        rows = rows[rows["gold"].str.startswith("ppl:")].assign(corpus=rows["gold"].str.removeprefix("ppl:"))
        by = ["proxy", "budget", "corpus"]
        self.damage = rows[rows["statistic"] == "nats_above_reference"].set_index(by)[["value", "lo", "hi"]]
        lead = rows[rows["statistic"] == "ppl_gain_percent"].set_index(by)[["value", "lo", "hi"]]
        # from what was gained to how PPL changed: the sign turns, and with it the ends
        self.lead = (-lead).rename(columns={"lo": "hi", "hi": "lo"})
        self.rivals = [name for name in self.strategies if name in set(self.lead.index.get_level_values("proxy"))]
        self.corpora = list(dict.fromkeys(rows["corpus"]))
        order = without_arms(plans).groupby("budget", sort=False)["bits_per_weight"].mean().sort_values().index
        self.budgets = [str(budget) for budget in order]
        # wikitext2_train is of one kind with wikitext2
        self.home = [c for c in self.corpora if any(name == c or name.startswith(f"{c}_") for name in calibrated)]

    def sentence(self) -> str:
        """Does the lead over uniform hold off the calibrated text?"""
        if not self.rivals:
            return "What each plan loses on every corpus"
        hero = BEST if BEST in self.rivals else self.rivals[0]
        lead = self.lead.loc[hero]
        away = lead[~lead.index.get_level_values("corpus").isin(self.home)]
        home = lead.drop(away.index)
        told = [
            f"{_verdict(part)} on {kind} text" for part, kind in ((home, "calibrated"), (away, "other")) if len(part)
        ]
        return f"PPL of {mark(hero).label} against uniform is lower {', and '.join(told)}"

    def label(self, corpus: str) -> str:
        return f"{corpus}\n(calibrated)" if corpus in self.home else corpus


def _verdict(lead: pd.DataFrame) -> str:
    """Cases whose whole interval lies on one side."""
    better, worse = int((lead["hi"] < 0).sum()), int((lead["lo"] > 0).sum())
    return f"in {better} of {len(lead)} cases" + (f" (higher in {worse})" if worse else "")


def _row(figure: Figure, grid: GridSpec, row: int, data: _Data, draw: Callable[[Axes, _Data, str], None]) -> list[Axes]:
    """A panel for each budget, with common axes."""
    panels: list[Axes] = []
    for column, budget in enumerate(data.budgets):
        first = panels[0] if panels else None
        axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
        draw(axes, data, budget)
        axes.tick_params(axis="y", length=0, labelleft=column == 0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#ececec", lw=0.7)
        axes.set_axisbelow(True)
        axes.set_title(budget)
        panels.append(axes)
    return panels


def _damage(axes: Axes, data: _Data, budget: str) -> None:
    _estimates(axes, data.damage, data, data.strategies, budget)
    if np.nanmin(data.damage["lo"]) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlabel("loss above the 16-bit model, nats a token")


def _names(axes: Axes, data: _Data) -> None:
    """Name the strategies of the first corpus beside their lines, on the side that has room."""
    for y, strategy in enumerate(data.strategies):
        if (key := (strategy, data.budgets[0], data.corpora[0])) in data.damage.index:
            row = data.damage.loc[key]
            crowded = axes.transLimits.transform(axes.transScale.transform((row["hi"], y)))[0] > 0.8
            axes.annotate(
                mark(strategy).label, (row["lo" if crowded else "hi"], y), (-6 if crowded else 6, 0),
                textcoords="offset points", va="center", ha="right" if crowded else "left", size=7.5,
            )  # fmt: skip


def _lead(axes: Axes, data: _Data, budget: str) -> None:
    axes.axvline(0, color=INK, lw=0.8)
    _estimates(axes, data.lead, data, data.rivals, budget)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("change of PPL against uniform, %  (left: better)")


def _estimates(axes: Axes, rows: pd.DataFrame, data: _Data, strategies: list[str], budget: str) -> None:
    """A line and a mark for each strategy, corpus by corpus."""
    step = len(strategies) + 0.8
    for place, corpus in enumerate(data.corpora):
        for shift, strategy in enumerate(strategies):
            if (strategy, budget, corpus) not in rows.index:
                continue
            row, y, style = rows.loc[(strategy, budget, corpus)], place * step + shift, mark(strategy)
            axes.plot([row["lo"], row["hi"]], [y, y], color=style.colour, lw=1.6, solid_capstyle="butt")
            face = "white" if strategy == UNIFORM else style.colour
            axes.plot(row["value"], y, style.marker, color=style.colour, mfc=face, ms=5.5)
    middle = [place * step + (len(strategies) - 1) / 2 for place in range(len(data.corpora))]
    axes.set_yticks(middle, [data.label(corpus) for corpus in data.corpora])
    axes.set_ylim(step * len(data.corpora) - 0.9, -0.9)
    axes.margins(x=0.08)
