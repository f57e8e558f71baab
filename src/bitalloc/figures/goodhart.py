"""The main figure: what a budget costs, and whether perplexity tells the truth about the tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bitalloc.figures.style import GREY, INK, LIGHT, headline, label_ends, mark, page
from bitalloc.statistics import accuracies
from bitalloc.tables import without_arms

REFERENCE, POOL, ALL = "reference", "random", "all"
CHOOSERS = {"kl": "by KL", "uniform": "uniform", "random": "at random"}
NO_CLAIM = {"floor": "at the floor: no claim", "saturated": "saturated: no claim", "too_few": "too few plans"}


def goodhart(  # noqa: PLR0917 - three tables, a message and where to put it
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    goodhart: pd.DataFrame,
    sentence: str,
    path: Path,
    stamp: str,
    *,
    model: str,
) -> None:
    """PLANS, EVALUATE, GOODHART and the message -> one PNG page; `stamp` are the gates' verdicts.

    Works with any number of tasks, none included, and with as few plans as one a budget.
    """
    page_data = _Page(plans, evaluate, goodhart)
    n_golds, n_budgets = len(page_data.golds), len(page_data.budgets)
    upper = max(3.9, 1.45 * n_golds + 0.7)
    lower = 0.19 * n_golds * (1 + max(n_budgets, len(page_data.choosers))) + 0.75 if n_golds else 0.0
    width = 13.5
    height = upper + lower + 1.9
    with page(width, height, path) as figure:
        bottom, top = headline(figure, sentence, page_data.footer(model, stamp))
        top -= 0.42 / height
        bottom += 0.55 / height
        middle = bottom + (lower - 0.6) / height
        split = middle + 0.95 / height
        _loss(figure.add_axes((0.062, split, 0.29, top - split)), page_data)
        _tasks(figure, page_data, (0.475, split, 0.5, top - split))
        if n_golds:
            _correlations(figure.add_axes((0.17, bottom, 0.285, middle - bottom)), page_data)
            _regrets(figure.add_axes((0.635, bottom, 0.285, middle - bottom)), page_data)


class _Page:
    """What the panels share: strata, golds, and each plan's scores."""

    def __init__(self, plans: pd.DataFrame, evaluate: pd.DataFrame, goodhart: pd.DataFrame) -> None:
        self.goodhart = goodhart
        proxies = goodhart["proxy"][goodhart["proxy"].str.startswith("nll:")]
        gains = goodhart["gold"][goodhart["gold"].str.startswith("ppl:")]
        self.corpus = str((pd.concat([proxies, gains])).iloc[0]).split(":", 1)[1]
        found, agree = accuracies(evaluate), evaluate[evaluate["metric"] == "top1"]
        self.word = "accuracy" if len(found) else "top-1 agreement"
        scored = (found if len(found) else agree).assign(task=lambda f: f["task"].str.removesuffix("/report"))
        self.golds = list(dict.fromkeys(scored["task"][~scored["task"].str.endswith("/select")]))
        self.gold = {name: scored[scored["task"] == name].set_index("plan") for name in self.golds}
        ppl = evaluate[(evaluate["metric"] == "ppl") & evaluate["task"].isin([self.corpus, f"{self.corpus}/report"])]
        self.ppl = ppl.set_index("plan")
        plans = without_arms(plans[plans["plan"].isin(self.ppl.index)])
        order = plans.groupby("budget", sort=False)["bits_per_weight"].mean().sort_values()
        self.budgets = [str(budget) for budget in order.index]
        self.plans = plans.assign(ppl=self.ppl.loc[plans["plan"], "value"].to_numpy())
        used = goodhart.loc[goodhart["statistic"] == "regret_points", "proxy"]
        self.choosers = {f"nll:{self.corpus}": "by PPL", **{k: v for k, v in CHOOSERS.items() if (used == k).any()}}

    @property
    def pool(self) -> pd.DataFrame:
        return self.plans[self.plans["strategy"] == POOL]

    @property
    def named(self) -> pd.DataFrame:
        return self.plans[self.plans["strategy"] != POOL]

    def rows(self, statistic: str, **where: str) -> pd.DataFrame:
        rows = self.goodhart[self.goodhart["statistic"] == statistic]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        return rows

    def footer(self, model: str, stamp: str) -> str:
        counts = f"{len(self.plans)} plans, {len(self.pool)} of them random"
        return (
            f"{model}: {counts}. PPL on {self.corpus}, report split. Lines are 95 % intervals: bootstrap over windows, "
            f"items and (correlations) plans; not corrected for the number of tasks. {stamp}"
        )


def _loss(axes: Axes, data: _Page) -> None:
    """Nats above the reference against bits a weight."""
    rows = data.rows("nats_above_reference", gold=f"ppl:{data.corpus}").set_index(["proxy", "budget"])
    reference = float(np.log(data.ppl.loc[REFERENCE, "value"])) if REFERENCE in data.ppl.index else 0.0
    values = [np.log(data.plans["ppl"].to_numpy()) - reference, rows["lo"].to_numpy()]
    axes.scatter(data.pool["bits_per_weight"], np.log(data.pool["ppl"]) - reference, s=7, color=LIGHT, lw=0, zorder=1)
    ends = {}
    for strategy, part in data.named.groupby("strategy", sort=False):
        style, part = mark(strategy), part.sort_values("bits_per_weight")  # noqa: PLW2901
        y = np.log(part["ppl"].to_numpy()) - reference
        bars = [rows.loc[key] if (key := (strategy, budget)) in rows.index else None for budget in part["budget"]]
        for x, bar in zip(part["bits_per_weight"], bars, strict=True):
            if bar is not None:
                axes.plot([x, x], [bar["lo"], bar["hi"]], color=style.colour, lw=1, alpha=0.6, zorder=2)
        _mark(axes, part["bits_per_weight"], y, strategy, line=True)
        ends[style.label] = (part["bits_per_weight"].iloc[-1], y[-1])
    if np.nanmin(np.concatenate(values)) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"Loss above the 16-bit model on {data.corpus}, nats a token")
    axes.set_xlabel("bits a weight, everything counted, over the planned matrices")
    axes.margins(x=0.08)
    axes.autoscale_view()
    if len(data.pool):
        first = data.pool.loc[data.pool["bits_per_weight"].idxmin()]
        at = data.pool[data.pool["budget"] == first["budget"]]
        axes.annotate(
            "random plans", (at["bits_per_weight"].min(), np.log(at["ppl"].max()) - reference), (9, 0),
            textcoords="offset points", color=GREY, size=7.5, va="center",
        )  # fmt: skip
    label_ends(axes, ends)


def _mark(axes: Axes, x: pd.Series, y: np.ndarray | pd.Series, strategy: str, *, line: bool = False) -> None:
    style = mark(strategy)
    if strategy == "best":  # a ring around the plan that it is a copy of
        axes.scatter(x, y, s=110, marker="o", facecolors="none", edgecolors=INK, linewidths=1.1, zorder=5)
        return
    if line:
        axes.plot(x, y, color=style.colour, lw=0.8, alpha=0.5, zorder=2)
    hollow = "white" if strategy == "uniform" else style.colour
    axes.scatter(
        x, y, s=26, marker=style.marker, facecolors=hollow, edgecolors=style.colour, linewidths=1.0, zorder=4
    )  # fmt: skip


def _tasks(figure: Figure, data: _Page, box: tuple[float, float, float, float]) -> None:
    """A panel for each gold and budget: score against PPL."""
    left, bottom, width, height = box
    if not data.golds:
        return
    grid = figure.add_gridspec(
        len(data.golds), len(data.budgets), left=left, right=left + width, bottom=bottom, top=bottom + height,
        wspace=0.1, hspace=0.27,
    )  # fmt: skip
    for row, gold in enumerate(data.golds):
        first = None
        for column, budget in enumerate(data.budgets):
            axes = figure.add_subplot(grid[row, column], sharey=first)
            first = first or axes
            _task(axes, data, gold, budget)
            axes.tick_params(labelleft=column == 0, labelbottom=row == len(data.golds) - 1)
            if row == 0:
                axes.set_title(budget)
            if column == 0:
                axes.set_ylabel(f"{gold}\n{data.word}, %")
            if row == len(data.golds) - 1 and column == len(data.budgets) // 2:
                axes.set_xlabel(f"PPL on {data.corpus} (each column at equal bytes)")


def _task(axes: Axes, data: _Page, gold: str, budget: str) -> None:
    score = data.gold[gold]
    plans = data.plans[(data.plans["budget"] == budget) & data.plans["plan"].isin(score.index)]
    at = score.loc[plans["plan"]]
    plans = plans.assign(**{end: 100 * at[end].to_numpy() for end in ("value", "lo", "hi")})
    pool, named = plans[plans["strategy"] == POOL], plans[plans["strategy"] != POOL]
    axes.scatter(pool["ppl"], pool["value"], s=9, color="#a8a8a8", lw=0, zorder=1)
    axes.vlines(named["ppl"], named["lo"], named["hi"], color=GREY, lw=0.7, alpha=0.6, zorder=2)
    for strategy, part in named.groupby("strategy", sort=False):
        _mark(axes, part["ppl"], part["value"], strategy)
    if REFERENCE in score.index:
        axes.axhline(100 * score.loc[REFERENCE, "value"], color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
        if gold == data.golds[0] and budget == data.budgets[0]:
            axes.annotate(
                "16-bit model", (1.0, 100 * score.loc[REFERENCE, "value"]), (0, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", va="bottom", size=7, color=GREY,
            )  # fmt: skip
    rho = data.rows("spearman", proxy=f"nll:{data.corpus}", gold=gold, budget=budget)
    if len(rho):
        axes.set_title(_rho(rho.iloc[0]), size=7.5, weight="normal", color=GREY, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.08)


def _rho(row: pd.Series) -> str:
    if row["status"] != "ok" or not np.isfinite(row["lo"]):
        return NO_CLAIM.get(row["status"], "")
    return f"\u03c1 {row['value']:.2f} [{row['lo']:.2f}, {row['hi']:.2f}]".replace("-", "\u2212")


def _correlations(axes: Axes, data: _Page) -> None:
    """Rank correlations of PPL and each gold, by budget and over all."""
    rows = data.rows("spearman", proxy=f"nll:{data.corpus}")
    budgets = [*data.budgets, ALL] if len(data.budgets) > 1 else data.budgets
    labels = {budget: "all budgets" if budget == ALL else budget for budget in budgets}
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlim(-1.03, 1.03)
    _forest(axes, data, rows, "budget", labels, strong=ALL)
    axes.set_title(f"Does PPL rank the plans as {data.word} does?  Spearman\u2019s \u03c1")
    axes.set_xlabel(f"\u2190 lower PPL, higher {data.word}        no relation        the contrary \u2192")


def _regrets(axes: Axes, data: _Page) -> None:
    """Points lost by choosing a plan by each rule, over all budgets."""
    rows = data.rows("regret_points", budget=ALL)
    axes.axvline(0, color=GREY, lw=0.8)
    _forest(axes, data, rows, "proxy", data.choosers, strong=f"nll:{data.corpus}")
    axes.set_title("What choosing a plan costs, against the cross-fitted best")
    axes.set_xlabel(
        f"points of {data.word} lost, mean over the budgets\n(below 0: better than what half of the items choose)"
    )


def _forest(axes: Axes, data: _Page, rows: pd.DataFrame, column: str, labels: dict[str, str], *, strong: str) -> None:
    """One line an estimate: golds as bold groups, `labels` (value of `column` -> text) within each."""
    ticks, texts, y = [], [], 0.0
    for gold in data.golds:
        axes.annotate(
            gold, (0, y + (len(labels) - 1) / 2), (-78, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", weight="bold",
        )  # fmt: skip
        found = rows[rows["gold"] == gold].set_index(column)
        silent = set(found["status"])
        if len(silent) == 1 and "ok" not in silent:
            _remark(axes, NO_CLAIM[silent.pop()], y + (len(labels) - 1) / 2)
            found = found.iloc[:0]
        for key, text in labels.items():
            ticks, texts = [*ticks, y], [*texts, text]
            if key in found.index:
                _estimate(axes, found.loc[key], y, strong=key == strong)
            y += 1
        y += 0.7
    axes.set_yticks(ticks, texts, size=7.5)
    axes.set_ylim(y - 1, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)


def _estimate(axes: Axes, row: pd.Series, y: float, *, strong: bool) -> None:
    if row["status"] != "ok" or not np.isfinite(row["value"]):
        _remark(axes, NO_CLAIM.get(row["status"], "not defined"), y)
        return
    colour = INK if strong else GREY
    axes.plot([row["lo"], row["hi"]], [y, y], color=colour, lw=2.2 if strong else 1.1, solid_capstyle="butt")
    axes.plot(
        row["value"], y, marker="D" if strong else "o", ms=5.5 if strong else 4.5, color=colour,
        mfc=colour if strong else "white",
    )  # fmt: skip


def _remark(axes: Axes, text: str, y: float) -> None:
    axes.annotate(
        text, (0.5, y), xycoords=("axes fraction", "data"), size=7.5, color=GREY, ha="center", va="center",
        style="italic", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip
