"""What every rule by position costs every model: damage by corpus, paired over windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bitalloc.config import Study
from bitalloc.figures.style import GREY, INK, LIGHT, headline, page

LINE = 0.15  # inches of an estimate
LABELS = {
    "all_high": "all {high}",
    "all_low": "all {low}",
    "early": "early MLPs",
    "early_0": "early, with block 0",
    "middle": "middle MLPs",
    "late": "late MLPs",
    "last": "last block",
    "champion": "early + last attention",
}
METRICS = {"kl_nats_per_token": "KL, nats a token", "ln_ppl_ratio": "ln PPL ratio, nats a token"}
SHAPES = (("o", INK), ("s", "white"), ("^", GREY), ("D", "white"), ("v", INK))  # of the corpora: marker and fill


def position(table: pd.DataFrame, criteria: pd.DataFrame, study: Study, path: Path) -> None:
    """POSITION and CRITERIA -> PNG: a column for each model, a row for each rule, KL above and perplexity below."""
    models = table.drop_duplicates("model")[["model", "blocks"]].itertuples(index=False, name=None)
    models = list(models)
    tall = LINE * len(study.rules) * (len(study.corpora) + 1.3)
    height, width = 2 * tall + 2.9, max(9.0, 2.4 + 2.6 * len(models))
    low = study.low.upper()
    footer = (
        f"{study.title} What is named at the left stays at {study.high.upper()}, a quarter of the MLPs in early, "
        f"middle and late; all else has {low}, simulated: absmax, one scale a row. Dashed: all {low} on "
        f"{study.corpora[0]}. Damage against the unquantised model; lines are 95 % intervals over windows. Verdicts "
        "pair the windows, and so see smaller differences."
    )
    with page(width, height, path) as figure:
        bottom, top = headline(figure, sentence(criteria, study), footer, size=11.5)
        grid = figure.add_gridspec(
            2, len(models), left=1.65 / width, right=1 - 0.4 / width, bottom=bottom + 0.5 / height,
            top=top - 0.55 / height, wspace=0.12, hspace=0.75 / tall,
        )  # fmt: skip
        for row, (metric, label) in enumerate(METRICS.items()):
            for column, (model, blocks) in enumerate(models):
                axes = figure.add_subplot(grid[row, column])
                part = table[(table["model"] == model) & (table["metric"] == metric)]
                _panel(axes, part.set_index(["rule", "corpus"]), study, first=column == 0)
                axes.set_xlabel(label)
                if not row:
                    axes.set_title(f"{model}, {blocks} blocks")
                if metric.startswith("kl"):
                    axes.set_xlim(left=0)
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            *handles, loc="upper right", bbox_to_anchor=(1 - 0.25 / width, top + 0.02 / height),
            ncols=len(study.corpora), frameon=False, handletextpad=0.2, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip


def sentence(criteria: pd.DataFrame, study: Study) -> str:
    """In how many models are early MLPs worth more than twice as much as middle and late ones, at home, by KL?"""
    rows = criteria[criteria["criterion"].str.startswith("early >") & (criteria["metric"] == "kl_nats_per_token")]
    run = rows[rows["verdict"] != "not run"].groupby("model", sort=False)["verdict"]
    if not len(run):
        return "What each rule by position costs"
    met = sum((each == "met").all() for _, each in run)
    return (
        f"At {study.low.upper()}, early MLPs are worth over twice as much as middle and late in "
        f"{met} of {len(run)} model{'s' * (len(run) > 1)}"
    )


def _panel(axes: Axes, rows: pd.DataFrame, study: Study, *, first: bool) -> None:
    step = len(study.corpora) + 1.3
    ticks = np.arange(len(study.rules)) * step
    home = (study.corpora[0], "all_low")
    if home[1] in study.rules:
        axes.axvline(rows.loc[(home[1], home[0]), "value"], color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.axvline(0, color=LIGHT, lw=0.8, zorder=0)
    for place, corpus in enumerate(study.corpora):
        marker, fill = SHAPES[place % len(SHAPES)]
        found = rows.xs(corpus, level="corpus").loc[list(study.rules)]
        y = ticks + place - (len(study.corpora) - 1) / 2
        axes.hlines(y, found["lo"], found["hi"], color=INK, lw=1.1, zorder=2)
        axes.plot(found["value"], y, marker, ms=4.5, color=INK, mfc=fill, mew=0.9, zorder=3, label=corpus)
    axes.set_ylim(ticks[-1] + step / 2, -step / 2)
    axes.set_yticks(ticks, _labels(study) if first else [""] * len(ticks))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.grid(axis="x", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)


def _labels(study: Study) -> Sequence[str]:
    names = {"high": study.high.upper(), "low": study.low.upper()}
    return [LABELS.get(rule, rule).format(**names) for rule in study.rules]
