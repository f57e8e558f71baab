"""Who pays for quantisation: relative damage by language under every arm, the worst language by arm, and the units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bitalloc.figures.style import GREY, INK, LIGHT, headline, page

LINE = 0.17  # inches of an estimate
LABELS = {
    "none": "nothing protected",
    "fair": "fair",
    "english": "English only",
    "allocator": "languages ignored",
    "pattern": "L0 + L9 + L11",
    "random": "random, mean",
}
PLANNED = {
    "fair": "fair",
    "english": "English only",
    "allocator": "languages ignored",
    "uniform": "uniform",
    "random": "random, mean",
}
SHAPES = {"none": ("o", "white"), "fair": ("o", INK), "english": ("s", "white"), "allocator": ("D", LIGHT)}
SHAPES |= {"pattern": ("^", GREY)}


def fairness(table: pd.DataFrame, units: pd.DataFrame, path: Path, *, note: str = "") -> None:
    """FAIRNESS and PROTECTED -> PNG. Without PROTECTED rows (nothing could be ranked) the languages alone are drawn."""
    arms = [arm for arm in SHAPES if (table["arm"] == arm).any()]
    rel = table[table["metric"] == "damage_rel"].set_index(["arm", "language"])
    languages = list(dict.fromkeys(rel.index.get_level_values("language")))
    ranked = len(units) > 0
    rows = max(len(languages) * (len(arms) + 1.2), 1.5 * (len(LABELS) + 1), 1.4 * len(units))
    height, width = LINE * rows + 2.3, 13.5 if ranked else 10.0
    n = int(rel["n"].max())
    footer = (
        f"{note}. Relative damage: nats that aligned sentences cost more, as a share of what "
        f"they cost the unquantised model. Lines: 95 % intervals, joint bootstrap of {n} groups of sentences of the "
        "report split. Selected on other sentences. In brackets: floor, no better than byte unigrams, not ranked."
    )
    with page(width, height, path) as figure:
        bottom, top = headline(figure, sentence(table), footer, size=11.5)
        share = [1.25, 1.0, 0.8] if ranked else [1.0]
        grid = figure.add_gridspec(
            1, len(share), width_ratios=share, left=0.9 / width, right=1 - 0.3 / width, bottom=bottom + 0.5 / height,
            top=top - 0.55 / height, wspace=0.42,
        )  # fmt: skip
        axes = figure.add_subplot(grid[0])
        _languages(axes, rel, languages, arms)
        handles = axes.get_legend_handles_labels()
        figure.legend(
            *handles, loc="upper left", bbox_to_anchor=(0.2 / width, top + 0.02 / height), ncols=len(arms),
            frameon=False, handletextpad=0.2, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip
        if ranked:
            _worst(figure.add_subplot(grid[1]), table)
            _units(figure.add_subplot(grid[2]), units)


def fairness_plans(table: pd.DataFrame, path: Path) -> None:
    """FAIRNESS of plans -> PNG: at every budget the worst language's damage under each way to choose the bits."""
    budgets = list(dict.fromkeys(table["budget"]))
    worst = table[table["metric"] == "worst_rel"]
    arms = [arm for arm in PLANNED if (worst["arm"] == arm).any()]
    height, width = 2 * LINE * len(arms) + 2.5, max(7.0, 1.8 + 3.4 * len(budgets))
    n = int(worst["n"].max())
    footer = (
        "Relative damage: nats that aligned sentences cost more, as a share of what the unquantised model needs, of "
        f"the language that loses most. Lines: 95 % intervals, joint bootstrap of {n} groups of sentences of the "
        "report split; ticks: random plans. Chosen on other sentences; all plans within the same bytes."
    )
    with page(width, height, path) as figure:
        bottom, top = headline(figure, sentence_of_plans(worst), footer, size=11.5)
        grid = figure.add_gridspec(
            1, len(budgets), left=1.6 / width, right=1 - 0.3 / width, bottom=bottom + 0.5 / height,
            top=top - 0.35 / height, wspace=0.15,
        )  # fmt: skip
        for place, budget in enumerate(budgets):
            axes, rows = figure.add_subplot(grid[place]), worst[worst["budget"] == budget].set_index("arm")
            drawn = rows[rows.index.str.startswith("random-")]["value"]
            for y, arm in enumerate(arms):
                if arm == "random":
                    axes.plot(drawn, np.full(len(drawn), y + 0.28), "|", color=GREY, ms=7, mew=0.8, zorder=1)
                if arm in rows.index:
                    axes.hlines(y, rows.loc[arm, "lo"], rows.loc[arm, "hi"], color=INK, lw=1.3, zorder=2)
                    fill = INK if arm == "fair" else "white"
                    axes.plot(rows.loc[arm, "value"], y, "o", ms=5.5, color=INK, mfc=fill, zorder=3)
            axes.set_yticks(range(len(arms)), [PLANNED[arm] if not place else "" for arm in arms])
            axes.set_ylim(len(arms) - 0.4, -0.6)
            axes.set_xlim(left=0)
            _finish(axes, "worst relative damage")
            axes.set_title(budget)


def sentence_of_plans(worst: pd.DataFrame) -> str:
    """At how many budgets the plan for the worst-off surely beats the one that ignores languages."""
    at = worst.set_index(["budget", "arm"])["value"].unstack("arm")
    if "fair" not in at:
        return "No language is better known than its byte unigrams: nothing is ranked"
    change = at["fair"] / at["allocator"] - 1
    least, most = change.min(), change.max()
    return f"Bits chosen for the worst-off language: its damage {least:+.0%} to {most:+.0%} beside languages ignored"


def sentence(table: pd.DataFrame) -> str:
    """What protecting the fair set does to the language that is hit hardest."""
    worst = table[table["metric"] == "worst_rel"].set_index("arm")["value"]
    if "fair" not in worst:
        return "No language is better known than its byte unigrams: nothing is ranked"
    plan = table.loc[table["arm"] == "fair", "plan"].iloc[0].replace("+", " + ")
    kept = "Protecting nothing" if plan == "none" else f"Protecting {plan}"
    by_chance = f"; random sets within the same bytes {worst['random']:.2%}" if "random" in worst else ""
    return f"{kept} takes the worst language's damage from {worst['none']:.2%} to {worst['fair']:.2%}{by_chance}"


def _languages(axes: Axes, rel: pd.DataFrame, languages: list[str], arms: list[str]) -> None:
    step = len(arms) + 1.2
    ticks = np.arange(len(languages)) * step
    axes.axvline(0, color=GREY, lw=0.8, zorder=0)
    for place, arm in enumerate(arms):
        found = rel.loc[arm].loc[languages]
        y = ticks + place - (len(arms) - 1) / 2
        marker, fill = SHAPES[arm]
        axes.hlines(y, found["lo"], found["hi"], color=INK, lw=1.1, zorder=2)
        axes.plot(found["value"], y, marker, ms=5, color=INK, mfc=fill, mew=0.9, zorder=3, label=LABELS[arm])
    status = rel.loc[arms[0]].loc[languages, "status"]
    axes.set_yticks(ticks, [name if status[name] == "ok" else f"({name}) floor" for name in languages])
    axes.set_ylim(ticks[-1] + step / 2, -step / 2)
    _finish(axes, "relative damage")
    axes.set_title("By language")


def _worst(axes: Axes, table: pd.DataFrame) -> None:
    worst = table[table["metric"] == "worst_rel"].set_index("arm")
    arms = [arm for arm in LABELS if arm in worst.index]
    drawn = worst[worst.index.str.startswith("random-")]["value"]
    for y, arm in enumerate(arms):
        row = worst.loc[arm]
        if arm == "random":
            axes.plot(drawn, np.full(len(drawn), y + 0.28), "|", color=GREY, ms=7, mew=0.8, zorder=1)
        axes.hlines(y, row["lo"], row["hi"], color=INK, lw=1.3, zorder=2)
        axes.plot(row["value"], y, "o", ms=5.5, color=INK, mfc=INK if arm == "fair" else "white", zorder=3)
    axes.axvline(worst.loc["fair", "value"], color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    size = {arm: f"\n{worst.loc[arm, 'nbytes'] / 1e6:.3g} MB" if arm != "random" else "" for arm in arms}
    axes.set_yticks(range(len(arms)), [LABELS[arm] + size[arm] for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    _finish(axes, "worst relative damage")
    axes.set_title(f"Worst language by arm; ticks: {len(drawn)} random sets")


def _units(axes: Axes, units: pd.DataFrame) -> None:
    y = np.arange(len(units))
    axes.barh(y, units["frequency"], color=np.where(units["chosen"], INK, LIGHT), height=0.7)
    for place, row in zip(y, units.itertuples(), strict=True):
        axes.text(1.02, place, f"{row.nbytes / 1e6:.3g} MB", va="center", size=7.5, color=GREY)
    axes.set_yticks(y, list(units["unit"]))
    axes.set_ylim(len(units) - 0.4, -0.6)
    axes.set_xlim(0, 1.25)
    _finish(axes, "share of resamples that select it")
    axes.set_xticks([0, 0.5, 1])
    axes.set_title("Selected; dark: chosen")


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
