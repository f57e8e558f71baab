"""The main figure: what could be seen, what perplexity promised, what the tasks got, and where the two part.

Read from above: the lead over uniform and what could be seen at all, every plan with its PPL and its tasks, ranks and
costs of choosing, the kinds of failure. Told apart by shape and by words, never by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bitalloc.figures.evidence import ALL, BEST, NO_CLAIM, POOL, REFERENCE, Evidence, in_words
from bitalloc.figures.style import GREY, INK, LIGHT, headline, mark, page, room

WIDTH, LEFT, RIGHT = 13.5, 0.085, 0.985
Rows = Sequence[tuple[str, str, pd.Series | None, bool]]  # group, label, row, strong


def goodhart(  # noqa: PLR0917 - three tables, a message and where to put it
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    goodhart: pd.DataFrame,
    sentence: str,
    path: Path,
    stamp: str,
    *,
    model: str,
    calibrated: Sequence[str] = (),
) -> None:
    """PLANS, EVALUATE, GOODHART and the message -> one PNG page; `stamp` are the gates' verdicts.

    `calibrated` names the corpora that moments were measured on. Works with any number of tasks, none included, and
    with as few plans as one a budget.
    """
    data = Evidence(plans, evaluate, goodhart, calibrated)
    golds, budgets = len(data.golds), len(data.budgets)
    heights = {
        "lead": 0.5 + 0.26 * budgets,
        "plans": 1.42 * golds - 0.3,
        "forest": (0.165 * max(len(data.choosers), len(data.ranks)) + 0.12) * golds,
        "kinds": 0.19 * max(1, len(data.kinds())),
    }
    gaps = {"lead": 0.62, "plans": 1.1, "forest": 1.32, "kinds": 0.95}
    used = [name for name in heights if heights[name] > 0]
    height = sum(heights[name] + gaps[name] for name in used) + 0.45
    footer = data.footer(model, stamp)
    height += sum(room(sentence, footer))
    with page(WIDTH, height, path) as figure:
        _, top = headline(figure, sentence, footer)
        y, boxes = top, {}
        for name in used:
            y -= gaps[name] / height
            boxes[name] = (y - heights[name] / height, heights[name] / height)
            y -= heights[name] / height
        _lead(figure, data, boxes["lead"])
        if golds:
            _plans(figure, data, boxes["plans"])
            _forests(figure, data, boxes["forest"])
        _kinds(figure, data, boxes["kinds"])


# ---- power, and the lead over uniform
def _lead(figure: Figure, data: Evidence, box: tuple[float, float]) -> None:
    """PPL and every gold of best against uniform, budget by budget, over what could be seen at all."""
    bottom, height = box
    columns = ["", *data.golds]
    step = (RIGHT - LEFT + 0.02) / len(columns)
    for place, gold in enumerate(columns):
        axes = figure.add_axes((LEFT + place * step, bottom, step - 0.022, height))
        axes.set_ylim(len(data.budgets) - 0.4, -0.6)
        axes.set_yticks(range(len(data.budgets)), data.budgets if place == 0 else [""] * len(data.budgets))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=GREY, lw=0.8)
        statistic = "accuracy_points" if gold else "ppl_gain_percent"
        rows = data.rows(statistic, proxy=BEST, gold=gold or f"ppl:{data.corpus}").set_index("budget")
        for y, budget in enumerate(data.budgets):
            seen = data.row("detectable_points", gold=gold, budget=budget) if gold else None
            if seen is not None:
                axes.barh(y, 2 * seen["value"], 0.72, left=-seen["value"], color="#e3e3e3", lw=0, zorder=0)
            if budget in rows.index:
                _estimate(axes, rows.loc[budget], y, strong=_significant(data, gold, budget))
        _centred(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(f"{gold} ({_items(data, gold)})" if gold else f"PPL, {data.corpus}", size=8.5)
        axes.set_xlabel(f"points of {data.word}" if gold else "% lower than uniform")
    power = data.row("rho_half_width", budget=ALL)
    width = f" {power['n']} plans place \u03c1 = 0 within \u00b1{power['value']:.2f}." if power is not None else ""
    seen = len(data.rows("detectable_points"))
    grey = " Grey: too small to be seen with so many items (80 % power)." if seen else ""
    _question(
        figure,
        bottom + height,
        f"1  What did best gain over uniform at equal bytes, and what could be seen?{grey}{width}",
    )


def _significant(data: Evidence, gold: str, budget: str) -> bool:
    """PPL: its interval lies on one side of 0; a task: its declared test says so after Holm's correction."""
    if not gold:
        row = data.row("ppl_gain_percent", proxy=BEST, gold=f"ppl:{data.corpus}", budget=budget)
        return row is not None and bool(row["lo"] > 0 or row["hi"] < 0)
    rows = pd.concat([data.rows(name, proxy=BEST, gold=gold, budget=budget) for name in ("mcnemar_p", "clustered_p")])
    return bool((rows["p_adjusted"] < 0.05).any())


def _items(data: Evidence, gold: str) -> str:
    rows = data.rows("accuracy_points", gold=gold)
    return f"{rows['n'].iloc[0]} {'items' if data.word == 'accuracy' else 'windows'}" if len(rows) else "no items"


def _centred(axes: Axes) -> None:
    reach = max(np.abs(axes.get_xlim()))
    axes.set_xlim(-reach, reach)


def _question(figure: Figure, top: float, text: str) -> None:
    figure.text(0.3 / WIDTH, top + 0.3 / figure.get_figheight(), text, weight="bold", size=9.5, va="bottom")


# ---- every plan
def _plans(figure: Figure, data: Evidence, box: tuple[float, float]) -> None:
    """A row a gold: a panel a budget with every plan, and the gain of choosing harder."""
    bottom, height = box
    common = {"bottom": bottom, "top": bottom + height, "hspace": 0.36}
    grid = figure.add_gridspec(len(data.golds), len(data.budgets), left=LEFT, right=0.70, wspace=0.1, **common)
    harder = figure.add_gridspec(len(data.golds), 1, left=0.775, right=0.925, **common)
    for row, gold in enumerate(data.golds):
        first, last = None, row == len(data.golds) - 1
        for column, budget in enumerate(data.budgets):
            axes = figure.add_subplot(grid[row, column], sharey=first)
            first = first or axes
            _task(axes, data, gold, budget)
            axes.tick_params(labelleft=column == 0, labelbottom=last)
            if row == 0:
                axes.set_title(budget)
            if column == 0:
                axes.set_ylabel(f"{gold}, %")
            if last and column == len(data.budgets) // 2:
                axes.set_xlabel(f"PPL on {data.corpus}")
        axes = figure.add_subplot(harder[row, 0])
        _curve(axes, data, gold)
        if last:
            axes.set_xlabel("n, plans to choose from")
        axes.tick_params(labelbottom=last)
    top = bottom + height + 0.18 / figure.get_figheight()
    _question(
        figure, top, f"2  Does lower PPL mean higher {data.word}? Each mark is a plan, each column has equal bytes"
    )
    at, y = 0.745, top + 0.3 / figure.get_figheight()
    figure.text(at, y, "3  Does choosing harder keep paying?", weight="bold", size=9.5, va="bottom")
    figure.text(at, y, "points above the mean plan, best of n random ones", size=7.5, color=GREY, va="top")
    strategies = [name for name in dict.fromkeys(data.plans["strategy"]) if name not in (POOL, BEST)]
    _legend(figure, [*strategies, BEST, POOL], bottom - 0.52 / figure.get_figheight())


def _legend(figure: Figure, strategies: Sequence[str], y: float) -> None:
    axes = figure.add_axes((LEFT, y - 0.006, 0.62, 0.012))
    axes.set_axis_off()
    axes.set_xlim(0, len(strategies))
    axes.set_ylim(-1, 1)
    for place, strategy in enumerate(strategies):
        if strategy == POOL:
            axes.scatter([place + 0.08], [0], s=9, color="#a8a8a8", lw=0)
        else:
            _mark(axes, [place + 0.08], [0], strategy)
        axes.text(place + 0.2, 0, "random" if strategy == POOL else mark(strategy).label, va="center", size=7.5)


def _mark(axes: Axes, x: Sequence[float], y: Sequence[float], strategy: str) -> None:
    style = mark(strategy)
    if strategy == BEST:  # a ring around the plan that it is a copy of
        axes.scatter(
            x, y, s=110, marker="o", facecolors="none", edgecolors=INK, linewidths=1.1, zorder=5, clip_on=False
        )
        return
    hollow = "white" if strategy == "uniform" else style.colour
    axes.scatter(
        x, y, s=26, marker=style.marker, facecolors=hollow, edgecolors=style.colour, linewidths=1.0, zorder=4,
        clip_on=False,
    )  # fmt: skip


def _task(axes: Axes, data: Evidence, gold: str, budget: str) -> None:
    score = data.gold[gold]
    plans = data.plans[(data.plans["budget"] == budget) & data.plans["plan"].isin(score.index)]
    at = score.loc[plans["plan"]]
    plans = plans.assign(**{end: 100 * at[end].to_numpy() for end in ("value", "lo", "hi")})
    pool, named = plans[plans["strategy"] == POOL], plans[plans["strategy"] != POOL]
    axes.scatter(pool["ppl"], pool["value"], s=9, color="#a8a8a8", lw=0, zorder=1)
    axes.vlines(named["ppl"], named["lo"], named["hi"], color=GREY, lw=0.7, alpha=0.6, zorder=2)
    for strategy, part in named.groupby("strategy", sort=False):
        _mark(axes, part["ppl"], part["value"], strategy)
    _reference(axes, data, gold, budget)
    rho = data.row("spearman", proxy=data.proxy, gold=gold, budget=budget)
    if rho is not None:
        told = rho["status"] == "ok" and np.isfinite(rho["lo"])
        text = f"\u03c1 {in_words(rho, 2)}" if told else NO_CLAIM.get(rho["status"], "")
        axes.set_title(text, size=7.5, weight="normal", color=GREY, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.08)


def _reference(axes: Axes, data: Evidence, gold: str, budget: str) -> None:
    """The unquantised model as a line, where it does not squeeze the plans together."""
    score = data.gold[gold]
    values = 100 * score.loc[score.index.isin(data.plans["plan"]), "value"]
    if REFERENCE not in score.index or values.empty:
        return
    level = 100 * score.loc[REFERENCE, "value"]
    if level - values.max() > max(values.max() - values.min(), 1.0) / 2:
        return
    axes.axhline(level, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
    if gold == data.golds[0] and budget == data.budgets[0]:
        axes.annotate(
            "16-bit model", (0.0, level), (3, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="left", va="bottom", size=7, color=GREY,
        )  # fmt: skip


def _curve(axes: Axes, data: Evidence, gold: str) -> None:
    """Mean gold of the proxy's best of n random plans above the mean plan's, exact over all subsets."""
    axes.axhline(0, color=GREY, lw=0.8)
    ends = {}
    for proxy, style in (
        (data.proxy, {"color": INK, "lw": 1.6}),
        ("kl", {"color": GREY, "lw": 1.1, "ls": (0, (4, 2))}),
    ):
        rows = data.curve(proxy, gold)
        if rows.empty:
            continue
        if proxy == data.proxy:
            axes.fill_between(rows["n_best"], rows["lo"], rows["hi"], color=LIGHT, alpha=0.5, lw=0)
        axes.plot(rows["n_best"], rows["value"], marker="o" if proxy == data.proxy else "", ms=3, **style)
        ends["PPL" if proxy == data.proxy else "KL"] = (rows["n_best"].iloc[-1], rows["value"].iloc[-1])
    if silent := data.silent(gold) or ("" if ends else NO_CLAIM["too_few"]):
        axes.set_title(silent, size=7.5, weight="normal", color=GREY, loc="right")
    if not ends:
        axes.set_xticks([])
        return
    axes.set_xscale("log", base=2)
    ticks = [n for n in data.curve(data.proxy, gold)["n_best"] if not n & (n - 1)]  # powers of two
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    lo, hi = axes.get_ylim()
    axes.set_ylim(min(lo, -1.0), max(hi, 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the last points, the higher one above."""
    order = sorted(ends, key=lambda name: ends[name][1])
    for shift, name in zip((-5, 5) if len(order) > 1 else (0,), order, strict=False):
        axes.annotate(
            name, ends[name], (7, shift), textcoords="offset points", va="center", size=7.5, annotation_clip=False
        )


# ---- ranks and costs
def _forests(figure: Figure, data: Evidence, box: tuple[float, float]) -> None:
    bottom, height = box
    left = figure.add_axes((0.19, bottom, 0.27, height))
    rows = [
        (
            gold,
            text,
            data.row(statistic, proxy=proxy, gold=gold, budget=ALL),
            statistic == "spearman" and proxy == data.proxy,
        )
        for gold in data.golds
        for (statistic, proxy), text in data.ranks.items()
    ]
    left.set_xlim(-1.03, 1.03)
    _forest(left, data, rows)
    left.set_xlabel(f"\u2190 lower PPL, higher {data.word}      Spearman\u2019s \u03c1      the contrary \u2192")
    right = figure.add_axes((0.69, bottom, 0.27, height))
    rows = [
        (gold, text, data.row("regret_points", proxy=chooser, gold=gold, budget=ALL), chooser == data.proxy)
        for gold in data.golds
        for chooser, text in data.choosers.items()
    ]
    _forest(right, data, rows)
    right.set_xlabel(f"points of {data.word} lost, mean over the budgets")
    _question(
        figure,
        bottom + height - 0.1 / figure.get_figheight(),
        "4  Does PPL rank the plans right? Mean over the budgets",
    )
    at = 0.53
    figure.text(
        at, bottom + height + 0.2 / figure.get_figheight(), "5  What does choosing a plan cost, by which proxy?",
        weight="bold", size=9.5, va="bottom",
    )  # fmt: skip


def _forest(axes: Axes, data: Evidence, rows: Rows) -> None:
    """One line an estimate, golds as bold groups."""
    axes.axvline(0, color=GREY, lw=0.8)
    ticks, texts, y = [], [], 0.0
    for gold in data.golds:
        members = [each for each in rows if each[0] == gold]
        middle = y + (len(members) - 1) / 2
        axes.annotate(
            gold, (0, middle), (-96, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            va="center", weight="bold",
        )  # fmt: skip
        silent = {row["status"] for *_, row, _ in members if row is not None}
        quiet = len(silent) == 1 and "ok" not in silent
        if quiet:
            _remark(axes, NO_CLAIM.get(silent.pop(), "not defined"), middle)
        for _, text, row, strong in members:
            ticks, texts = [*ticks, y], [*texts, text]
            if row is not None and not quiet:
                _estimate(axes, row, y, strong=strong)
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
        _remark(axes, "no claim" if row["status"] in NO_CLAIM else "not defined", y)
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


# ---- the kinds of failure
def _kinds(figure: Figure, data: Evidence, box: tuple[float, float]) -> None:
    bottom, height = box
    kinds = data.kinds()
    for line, (kind, what, found) in enumerate(kinds):
        y = bottom + height * (1 - (line + 0.5) / len(kinds))
        for x, text, style in ((LEFT, kind, {"weight": "bold"}), (0.2, what, {}), (0.53, found, {"color": INK})):
            figure.text(x, y, text, size=8, va="center", **style)
    _question(figure, bottom + height - 0.12 / figure.get_figheight(), "6  How could PPL mislead, and did it?")
