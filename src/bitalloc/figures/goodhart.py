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

from bitalloc.figures.style import GREY, INK, LIGHT, headline, mark, page, room
from bitalloc.statistics import accuracies
from bitalloc.tables import without_arms

REFERENCE, POOL, BEST, ALL = "reference", "random", "best", "all"
NO_CLAIM = {
    "floor": "at the floor: no claim",
    "saturated": "as good as the 16-bit model: no claim",
    "too_few": "too few plans",
    "missing": "not evaluated",
}
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
    data = _Page(plans, evaluate, goodhart, calibrated)
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


class _Page:
    """What the panels share: strata, golds, and each plan's scores."""

    def __init__(
        self, plans: pd.DataFrame, evaluate: pd.DataFrame, goodhart: pd.DataFrame, calibrated: Sequence[str]
    ) -> None:
        self.goodhart, self.calibrated = goodhart, calibrated
        proxies = goodhart["proxy"][goodhart["proxy"].str.startswith("nll:")]
        gains = goodhart["gold"][goodhart["gold"].str.startswith("ppl:")]
        self.corpus = str((pd.concat([proxies, gains])).iloc[0]).split(":", 1)[1]
        self.proxy = f"nll:{self.corpus}"
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
        self.choosers = {name: self.by(name) for name in dict.fromkeys(used)}
        ranks = {
            ("spearman", self.proxy): "PPL, all plans",
            ("spearman_near", self.proxy): "PPL, nearer half",
            ("spearman", "kl"): "KL, all plans",
        }
        self.ranks = {key: text for key, text in ranks.items() if len(self.rows(key[0], proxy=key[1]))}

    def by(self, chooser: str) -> str:
        """The chooser in words; PPL on text that was calibrated on says so."""
        if not chooser.startswith("nll:"):
            return {"kl": "KL", "objective": "predicted KL", "random": "at random", "uniform": "uniform"}.get(
                chooser, chooser
            )
        corpus = chooser.removeprefix("nll:")
        home = any(name == corpus or name.startswith(f"{corpus}_") for name in self.calibrated)
        return f"PPL, {corpus}" + ("*" if home else "")

    def rows(self, statistic: str, **where: str) -> pd.DataFrame:
        rows = self.goodhart[self.goodhart["statistic"] == statistic]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        return rows

    def row(self, statistic: str, **where: str) -> pd.Series | None:
        rows = self.rows(statistic, **where)
        return rows.iloc[0] if len(rows) else None

    def silent(self, gold: str) -> str:
        """Why nothing is claimed of a gold, or nothing."""
        status = set(self.rows("regret_points", gold=gold, budget=ALL)["status"]) or {"ok"}
        return "" if "ok" in status else NO_CLAIM.get(status.pop(), "")

    def kinds(self) -> list[tuple[str, str, str]]:
        """Kind of failure, what it would be, what was measured."""
        return [
            ("regressional", "gain owed to the windows that chose the plan", self._shrinkage()),
            (
                "extremal",
                f"{self.word} bends against PPL where damage is large",
                self._told("extremal", "quadratic_points", ALL),
            ),
            ("causal", "at equal PPL it matters which component was harmed", self._told("causal", "matched_points")),
            ("leakage", "a search that saw the report windows leads there only", self._leakage()),
            ("over-optimisation", "choosing harder makes the tasks worse", self._turning()),
        ]

    def _shrinkage(self) -> str:
        row, claimed = (self.row(name, budget=ALL, proxy=self.proxy) for name in ("shrinkage_nats", "claimed_nats"))
        if row is None or claimed is None:
            return "not measured"
        return f"{_text(row, 4)} of {claimed['value']:.4f} nats"

    def _told(self, analysis: str, statistic: str, budget: str | None = None) -> str:
        rows = self.rows(statistic, analysis=analysis, proxy=self.proxy)
        rows = rows[rows["status"].eq("ok") & (True if budget is None else rows["budget"].eq(budget))]
        if rows.empty:
            return "not measured"
        told = rows[rows["p_adjusted"] < 0.05]
        where = [
            f"{r['gold']}{'' if budget else ' ' + r['budget'].replace('component ', '')} {_text(r, 1)}"
            for _, r in told.iterrows()
        ]
        return f"{', '.join(where)} points" if where else f"not told: 0 of {len(rows)} after correction"

    def _leakage(self) -> str:
        lead = self.rows("lead_nats", gold=f"ppl:{self.corpus}")
        if lead.empty:
            return "not measured"
        points = self.rows("lead_points")
        points = points[points["status"] == "ok"]
        told = int(((points["lo"] > 0) | (points["hi"] < 0)).sum())
        row = lead.loc[lead["value"].idxmax()]
        where = f"at most {_text(row, 4)} nats there ({row['budget']})"
        return f"{where}; {self.word} differs in {told} of {len(points)} cases"

    def _turning(self) -> str:
        rows = self.rows("beta_points", proxy=self.proxy, budget=ALL)
        rows = rows[rows["status"] == "ok"]
        if rows.empty:
            return "not measured"
        turning = self.rows("turning_pressure", proxy=self.proxy, budget=ALL, status="ok")
        falls = [f"{r['gold']} falls beyond d = {_text(r, 2)}" for _, r in turning.iterrows()]
        curves = {gold: _points(self, self.proxy, gold) for gold in rows["gold"]}
        falls += [f"{gold} gets worse" for gold, curve in curves.items() if len(curve) and curve["hi"].iloc[-1] < 0]
        bends = rows.loc[rows["lo"] > 0, "gold"].tolist()
        return "; ".join(falls) or (f"returns diminish on {', '.join(bends)}, none falls" if bends else "not told")

    def footer(self, model: str, stamp: str) -> str:
        pool = (self.plans["strategy"] == POOL).sum()
        home = " *: text that was calibrated on." if self.calibrated else ""
        return (
            f"{model}: {len(self.plans)} plans at equal bytes, {pool} random. PPL on {self.corpus}, report split."
            f"{home} \u03c1: rank correlation, \u22121 where lower PPL always means higher {self.word}; nearer half: "
            "least KL. Costs are against the plan that is best on half of the items, judged on the others; below 0: "
            "better than that. d = \u221a(ln n \u2212 (n\u22121)/n), how hard was chosen. Lines are 95 % intervals. "
            f"Filled in 1: not 0, tasks after Holm's correction. {stamp}"
        )


def _text(row: pd.Series, digits: int) -> str:
    value, lo, hi = (f"{round(row[name], digits) + 0.0:.{digits}f}" for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]".replace("-", "\u2212")


# ---- power, and the lead over uniform
def _lead(figure: Figure, data: _Page, box: tuple[float, float]) -> None:
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


def _significant(data: _Page, gold: str, budget: str) -> bool:
    """PPL: its interval lies on one side of 0; a task: its declared test says so after Holm's correction."""
    if not gold:
        row = data.row("ppl_gain_percent", proxy=BEST, gold=f"ppl:{data.corpus}", budget=budget)
        return row is not None and bool(row["lo"] > 0 or row["hi"] < 0)
    rows = pd.concat([data.rows(name, proxy=BEST, gold=gold, budget=budget) for name in ("mcnemar_p", "clustered_p")])
    return bool((rows["p_adjusted"] < 0.05).any())


def _items(data: _Page, gold: str) -> str:
    rows = data.rows("accuracy_points", gold=gold)
    return f"{rows['n'].iloc[0]} {'items' if data.word == 'accuracy' else 'windows'}" if len(rows) else "no items"


def _centred(axes: Axes) -> None:
    reach = max(np.abs(axes.get_xlim()))
    axes.set_xlim(-reach, reach)


def _question(figure: Figure, top: float, text: str) -> None:
    figure.text(0.3 / WIDTH, top + 0.3 / figure.get_figheight(), text, weight="bold", size=9.5, va="bottom")


# ---- every plan
def _plans(figure: Figure, data: _Page, box: tuple[float, float]) -> None:
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
    _reference(axes, data, gold, budget)
    rho = data.row("spearman", proxy=data.proxy, gold=gold, budget=budget)
    if rho is not None:
        told = rho["status"] == "ok" and np.isfinite(rho["lo"])
        text = f"\u03c1 {_text(rho, 2)}" if told else NO_CLAIM.get(rho["status"], "")
        axes.set_title(text, size=7.5, weight="normal", color=GREY, loc="right")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(0.08)


def _reference(axes: Axes, data: _Page, gold: str, budget: str) -> None:
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


def _curve(axes: Axes, data: _Page, gold: str) -> None:
    """Mean gold of the proxy's best of n random plans above the mean plan's, exact over all subsets."""
    axes.axhline(0, color=GREY, lw=0.8)
    ends = {}
    for proxy, style in (
        (data.proxy, {"color": INK, "lw": 1.6}),
        ("kl", {"color": GREY, "lw": 1.1, "ls": (0, (4, 2))}),
    ):
        rows = _points(data, proxy, gold)
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
    ticks = [n for n in _points(data, data.proxy, gold)["n_best"] if not n & (n - 1)]  # powers of two
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    lo, hi = axes.get_ylim()
    axes.set_ylim(min(lo, -1.0), max(hi, 1.0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _name_ends(axes, ends)


def _points(data: _Page, proxy: str, gold: str) -> pd.DataFrame:
    rows = data.goodhart[data.goodhart["statistic"].str.startswith("gain_best_of_")]
    rows = rows[(rows["proxy"] == proxy) & (rows["gold"] == gold)]
    return rows.assign(n_best=rows["statistic"].str.removeprefix("gain_best_of_").astype(int)).sort_values("n_best")


def _name_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the last points, the higher one above."""
    order = sorted(ends, key=lambda name: ends[name][1])
    for shift, name in zip((-5, 5) if len(order) > 1 else (0,), order, strict=False):
        axes.annotate(
            name, ends[name], (7, shift), textcoords="offset points", va="center", size=7.5, annotation_clip=False
        )


# ---- ranks and costs
def _forests(figure: Figure, data: _Page, box: tuple[float, float]) -> None:
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


def _forest(axes: Axes, data: _Page, rows: Rows) -> None:
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
def _kinds(figure: Figure, data: _Page, box: tuple[float, float]) -> None:
    bottom, height = box
    kinds = data.kinds()
    for line, (kind, what, found) in enumerate(kinds):
        y = bottom + height * (1 - (line + 0.5) / len(kinds))
        for x, text, style in ((LEFT, kind, {"weight": "bold"}), (0.2, what, {}), (0.53, found, {"color": INK})):
            figure.text(x, y, text, size=8, va="center", **style)
    _question(figure, bottom + height - 0.12 / figure.get_figheight(), "6  How could PPL mislead, and did it?")
