"""GOODHART in plain sentences: what was found, and never more than the intervals say.

Every number is a cell of the table. A difference is claimed where its interval, or its corrected p-value, leaves no
room for none; equality only where an equivalence test shows it; everything else is called open.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bitalloc.analyses.study import ALL, BEST, LEAKED, POOL, UNIFORM
from bitalloc.statistics import accuracies

ALPHA = 0.05
PPL, PREDICTED = "PPL on ", "predicted KL"


def summary(
    goodhart: pd.DataFrame, evaluate: pd.DataFrame, plans: pd.DataFrame, gates: pd.DataFrame | None = None
) -> list[str]:
    """A paragraph, a sentence an element: what could be seen first, then what was, then what stays open.

    Where GATES says that nothing was to be gained over uniform, that is the message.
    """
    said = _Findings(goodhart, evaluate)
    parts = [
        *_near_uniform(gates), *said.power(), *said.answer(), *(said.agreement() or [said.too_few(plans)]),
        *said.silence(), *said.contradictions(), *said.gain(), *said.overoptimisation(), *said.taxonomy(),
        *said.flips(), *said.limits(),
    ]  # fmt: skip
    return [part[0].upper() + part[1:] for part in parts]


def headline(goodhart: pd.DataFrame, evaluate: pd.DataFrame, plans: pd.DataFrame, gates: pd.DataFrame) -> str:
    """The message in one sentence: the title of the page."""
    if uniform := _near_uniform(gates):
        return uniform[0]
    said = _Findings(goodhart, evaluate)
    return said.message() or next(iter(said.gain()), said.too_few(plans))


def _near_uniform(gates: pd.DataFrame | None) -> list[str]:
    if gates is None:
        return []
    rows = gates[(gates["check"] == "objective_gap") & (gates["mode"] == "fallback") & ~gates["go"].astype(bool)]
    return [
        f"Uniform is near-optimal: the optimal plan lowers the predicted KL by {row.value:.1%} at most "
        f"(criterion {row.threshold:.1%}), so the random pool was not evaluated."
        for row in rows.itertuples()
    ]


def proxy_name(proxy: str) -> str:
    """A proxy or chooser in words.

    >>> [proxy_name(name) for name in ("nll:world", "kl", "objective", "random", "uniform")]
    ['PPL on world', 'KL', 'predicted KL', 'a random pick', 'uniform']
    """
    named = {"kl": "KL", "objective": PREDICTED, POOL: "a random pick"}
    return PPL + proxy.removeprefix("nll:") if proxy.startswith("nll:") else named.get(proxy, proxy)


class _Findings:
    def __init__(self, goodhart: pd.DataFrame, evaluate: pd.DataFrame) -> None:
        self.table = goodhart
        self.tasks = len(accuracies(evaluate)) > 0
        self.word = "accuracy" if self.tasks else "top-1 agreement"
        self.proxy = next((name for name in goodhart["proxy"] if str(name).startswith("nll:")), "")

    def rows(self, analysis: str, statistic: str, **where: str) -> pd.DataFrame:
        """Rows that may be spoken of."""
        rows = self.table[(self.table["analysis"] == analysis) & (self.table["statistic"] == statistic)]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        return rows[rows["status"].isin(["ok", "beyond"]) & rows["value"].notna()]

    # ---- what could be seen
    def power(self) -> list[str]:
        found = self.rows("power", "detectable_points")
        width = self.rows("power", "rho_half_width", budget=ALL)
        parts = []
        if len(found):
            by_task = found.groupby("gold", sort=False)["value"].max()
            ends = sorted({f"{by_task.min():.1f}", f"{by_task.max():.1f}"}, key=float)
            parts.append(f"differences below about {' to '.join(ends)} points cannot be seen with so many items")
        if len(width):
            row = width.iloc[0]
            parts.append(f"{row['n']} plans place a rank correlation of 0 within +-{row['value']:.2f} at best")
        return [f"{'; '.join(parts)} (80 % power, 95 % intervals)."] if parts else []

    # ---- which proxy
    def answer(self) -> list[str]:
        """Which proxy one should select by, and what selecting by PPL costs."""
        rows = self.rows("regret", "versus_perplexity_points", gold=ALL)
        proxies = rows[~rows["proxy"].isin([POOL, UNIFORM])]
        if proxies.empty:
            return self.cost()
        better, worse = (proxies[_told(proxies) & sign] for sign in (proxies["value"] < 0, proxies["value"] > 0))
        own = proxy_name(self.proxy)
        parts = []
        if len(better):
            parts.append(f"select by {_names(better['proxy'].map(proxy_name))} rather than by {own}")
        else:
            parts.append(f"no proxy can be told to choose better than {own}")
        if len(worse):
            parts.append(f"{_names(worse['proxy'].map(proxy_name))} choose worse")
        shown = [f"{proxy_name(row['proxy'])} {_interval(row)}" for _, row in rows.iterrows()]
        numbers = (
            f"points of {self.word} lost beyond those by {own}, mean over the tasks that can tell: {'; '.join(shown)}"
        )
        kin = "" if self.tasks else " Top-1 agreement, which stands in for tasks, is close to KL by its nature."
        return [f"In this pool {'; '.join(parts)} ({numbers}; Holm's correction).{kin}", *self.cost()]

    def cost(self) -> list[str]:
        rows = self.rows("regret", "regret_points", budget=ALL)
        chosen = rows[rows["proxy"] == self.proxy]
        if chosen.empty:
            return []
        worst = chosen.loc[chosen["hi"].idxmax()]
        told = "" if worst["lo"] > 0 else ", not to be told from 0"
        others = rows[rows["gold"] == worst["gold"]].set_index("proxy")
        yardsticks = [
            f"{proxy_name(name)} {_interval(others.loc[name])}" for name in (POOL, UNIFORM) if name in others.index
        ]
        return [
            f"Choosing by {proxy_name(self.proxy)} costs {_interval(worst)} points of {self.word} where it may cost "
            f"most ({worst['gold']}), against the cross-fitted best plan{told}; {', '.join(yardsticks)}."
        ]

    # ---- does it rank
    def _pooled(self) -> pd.DataFrame:
        rows = self.rows("correlation", "spearman", proxy=self.proxy, budget=ALL)
        return rows[rows["lo"].notna()]

    def agreement(self) -> list[str]:
        pooled = self._pooled()
        shown = {row["gold"]: f"{row['gold']} (rho {_interval(row, 2)})" for _, row in pooled.iterrows()}
        verdicts = (
            (pooled["hi"] < 0, "PPL and {word} agree on {names}"),
            (pooled["lo"] > 0, "lower PPL goes with lower {word} on {names}"),
            ((pooled["lo"] <= 0) & (pooled["hi"] >= 0), "on {names} the interval covers 0: nothing can be said"),
        )
        parts = [
            text.format(word=self.word, names=_names([shown[gold] for gold in pooled.loc[mask, "gold"]]))
            for mask, text in verdicts
            if mask.any()
        ]
        return [f"{'; '.join(parts)}."] if parts else []

    def too_few(self, plans: pd.DataFrame) -> str:
        return f"Too few plans ({len(plans)}), or no task with a signal, to relate PPL to {self.word}."

    def silence(self) -> list[str]:
        """The half of the plans nearest to the reference, where the whole says that proxy and gold agree."""
        pooled = self._pooled()
        near = self.rows("correlation", "spearman_near", proxy=self.proxy, budget=ALL)
        near = near[near["gold"].isin(pooled.loc[pooled["hi"] < 0, "gold"]) & near["lo"].notna()]
        if near.empty:
            return []
        trust = self.rows("correlation", "reliability_near", budget=ALL).set_index("gold")["value"]
        shown = {
            row[
                "gold"
            ]: f"{row['gold']} (rho {_interval(row, 2)}, reliability {trust.get(row['gold'], float('nan')):.2f})"
            for _, row in near.iterrows()
        }
        verdicts = ((near["hi"] < 0, "they still agree on"), (near["hi"] >= 0, "that is open on"))
        parts = [f"{text} {_names(near.loc[mask, 'gold'].map(shown))}" for mask, text in verdicts if mask.any()]
        return [f"Among the half of the plans nearest to the reference {'; '.join(parts)}."]

    def contradictions(self) -> list[str]:
        """Pairs of equal bytes, one with the better PPL and the significantly worse task, beyond what chance makes."""
        rows = self.rows("divergence", "divergent_share")
        rows = rows[rows["lo"] > ALPHA / 2]
        if rows.empty:
            return []
        percent = rows.assign(**{name: 100 * rows[name] for name in ("value", "lo", "hi")})
        shown = _names([f"{_interval(row)} % on {_place(row)}" for _, row in percent.iterrows()])
        return [
            f"Of two plans the one with the better PPL (by 1 %) is significantly worse in {shown}; chance makes 2.5 %."
        ]

    # ---- what was gained
    def gain(self) -> list[str]:
        ppl = self.rows("gain", "ppl_gain_percent", proxy=BEST)
        if ppl.empty:
            return []
        ppl = ppl[ppl["gold"] == ppl["gold"].iloc[0]]
        sentence = "At equal bytes best changes PPL against uniform by " + _names(
            [
                f"{-row['value']:.1f} % [{-row['hi']:.1f}, {-row['lo']:.1f}] at {row['budget']}"
                for _, row in ppl.iterrows()
            ]
        )
        tests = pd.concat([self.rows("gain", name, proxy=BEST) for name in ("mcnemar_p", "clustered_p")])
        if tests.empty:
            return [sentence + "."]
        points = self.rows("gain", "accuracy_points", proxy=BEST).set_index(["gold", "budget"])["value"]
        found = [
            f"{row['gold']} at {row['budget']} ({points[row['gold'], row['budget']]:+.1f} points)"
            for _, row in tests[tests["p_adjusted"] < ALPHA].iterrows()
        ]
        outcome = (
            f"{self.word} differs significantly on {_names(found)}"
            if found
            else "no difference in accuracy is significant"
        )
        kept = self.rows("gain", "equivalence_p_vs_reference", proxy=BEST)
        shown = _names([f"{row['gold']} at {row['budget']}" for _, row in kept[kept["p_adjusted"] < ALPHA].iterrows()])
        loss = f"it keeps the reference's {self.word} within the margin on {shown}" if shown else (
            f"that it keeps the reference's {self.word} within the margin is shown for no task"
        )  # fmt: skip
        return [f"{sentence}; after Holm's correction {outcome}, and {loss}."]

    # ---- where it goes wrong
    def overoptimisation(self) -> list[str]:
        rows = self.rows("overoptimisation", "beta_points", proxy=self.proxy, budget=ALL)
        if rows.empty:
            return []
        hardest = self._hardest()
        worse = [f"{row['gold']} ({_interval(row)} points)" for _, row in hardest[hardest["hi"] < 0].iterrows()]
        parts = [f"Choosing harder by PPL makes {self.word} worse on {_names(worse)}."] if worse else []
        bends = rows[rows["lo"] > 0]
        if bends.empty:
            return parts or [f"Choosing harder by PPL: no bend of the curve can be told on {_names(rows['gold'])}."]
        turning = self.rows("overoptimisation", "turning_pressure", proxy=self.proxy, budget=ALL)
        inside = turning[turning["status"] == "ok"]
        shown = [f"{row['gold']} (beta {_interval(row)} points)" for _, row in bends.iterrows()]
        turn = f"{self.word} begins to fall at a pressure of " + _names(
            [f"{_interval(row, 2)} on {row['gold']}" for _, row in inside.iterrows()]
        ) if len(inside) else f"{self.word} falls nowhere within this pool"  # fmt: skip
        return [*parts, f"Choosing harder by PPL buys less and less on {_names(shown)}; {turn}."]

    def _hardest(self) -> pd.DataFrame:
        """Gain of the best of all random plans, where the pool has a curve."""
        sizes = self.table["statistic"].str.extract(r"^gain_best_of_(\d+)$")[0].dropna()
        name = f"gain_best_of_{sizes.astype(int).max()}" if len(sizes) else ""
        return self.rows("overoptimisation", name, proxy=self.proxy, budget=ALL)

    def taxonomy(self) -> list[str]:
        """Regressional, extremal, causal, and leakage in place of adversarial."""
        parts = []
        shrink = self.rows("regressional", "shrinkage_nats", proxy=self.proxy, budget=ALL)
        claimed = self.rows("regressional", "claimed_nats", proxy=self.proxy, budget=ALL)
        if len(shrink):
            told = "" if shrink["lo"].iloc[0] > 0 else " (not to be told from 0)"
            parts.append(
                f"regressional: of {claimed['value'].iloc[0]:.4f} nats that a choice on half of the windows claims, "
                f"{_interval(shrink.iloc[0], 4)} are gone on the others{told}"
            )
        for kind, statistic, what in (
            ("extremal", "quadratic_points", "bend of accuracy against PPL"),
            ("causal", "matched_points", "difference between components at equal PPL"),
        ):
            rows = self.rows(kind, statistic, proxy=self.proxy)
            rows = rows[rows["budget"] == ALL] if kind == "extremal" else rows
            if rows.empty:
                continue
            found = [f"{_place(row)} {_interval(row)} points" for _, row in rows[rows["p_adjusted"] < ALPHA].iterrows()]
            parts.append(f"{kind}: {what}: {_names(found)}" if found else f"{kind}: no {what} can be told")
        lead = self.rows("leakage", "lead_nats", proxy=LEAKED)
        if len(lead):
            seen = lead[lead["gold"] == lead["gold"].iloc[0]]
            points = self.rows("leakage", "lead_points", proxy=LEAKED)
            where = "on the tasks" if self.tasks else "in top-1 agreement on the same windows"
            told = points[(points["lo"] > 0) | (points["hi"] < 0)]
            leads = _names([f"{_interval(row, 4)} nats at {row['budget']}" for _, row in seen.iterrows()])
            tasks = (
                _names([f"{_place(row)} {_interval(row)} points" for _, row in told.iterrows()])
                or "none that can be told"
            )
            parts.append(f"leakage: a search that saw the report windows leads best by {leads}, and {where}: {tasks}")
        return [f"By kind: {'; '.join(parts)}."] if parts else []

    def flips(self) -> list[str]:
        rows = self.rows("flips", "flips_percent", proxy=BEST)
        if rows.empty:
            return []
        worst = rows.loc[rows["value"].idxmax()]
        floor = self.rows("flips", "flips_percent", gold=worst["gold"], budget=ALL)
        against = (
            f"a rerun of the reference {_interval(floor.iloc[0])}" if len(floor) else "a rerun, the floor, was not made"
        )
        return [f"Of the answers {_interval(worst)} % change at most with best ({_place(worst)}); {against}."]

    def limits(self) -> list[str]:
        """What the table cannot say: budgets by themselves, tasks without a signal."""
        parts = []
        rows = self.rows("correlation", "spearman", proxy=self.proxy)
        told = rows[(rows["hi"] < 0) | (rows["lo"] > 0)]
        settled = told.loc[told["budget"] == ALL, "gold"]
        inside = rows[(rows["budget"] != ALL) & rows["gold"].isin(settled)]
        open_ = inside[~inside.index.isin(told.index)]
        if len(open_):
            parts.append("taken by itself, not settled at " + _names(open_["budget"] + " (" + open_["gold"] + ")"))
        whole = self.table[(self.table["analysis"] == "correlation") & (self.table["budget"] == ALL)]
        for status, meaning in (
            ("floor", "not above chance in the reference"),
            ("saturated", "as good as the reference"),
        ):
            names = whole.loc[whole["status"] == status, "gold"]
            if len(names):
                parts.append(f"{_names(names)}: {meaning}, so no claim")
        return [f"{'; '.join(parts)}."] if parts else []

    def message(self) -> str:
        """Agreement, cost and alternative in one sentence; empty without a pool that could tell."""
        pooled = self._pooled()
        if pooled.empty:
            return ""
        agreed, against = pooled.loc[pooled["hi"] < 0, "gold"], pooled.loc[pooled["lo"] > 0, "gold"]
        open_ = pooled.loc[(pooled["lo"] <= 0) & (pooled["hi"] >= 0), "gold"]
        whether = [
            f"{text} on {_names(golds)}"
            for golds, text in (
                (agreed, f"PPL ranks plans as {self.word} does"),
                (against, "PPL ranks plans the wrong way round"),
                (
                    open_,
                    "it is open whether it does"
                    if len(agreed)
                    else f"whether PPL ranks plans as {self.word} does is open",
                ),
            )
            if len(golds)
        ]
        chosen = self.rows("regret", "regret_points", budget=ALL, proxy=self.proxy)
        cost = []
        if len(chosen):
            worst = chosen.loc[chosen["hi"].idxmax()]
            cost.append(f"selecting by it costs {_interval(worst)} points where it may cost most ({worst['gold']})")
        rows = self.rows("regret", "versus_perplexity_points", gold=ALL)
        proxies = rows[~rows["proxy"].isin([POOL, UNIFORM])]
        better = proxies[_told(proxies) & (proxies["value"] < 0)]
        if len(better):
            cost.append(f"{_names(better['proxy'].map(proxy_name))} chooses better")
        elif len(proxies):
            cost.append("no other proxy is told to be better")
        stand_in = [] if self.tasks else ["No task was run, top-1 agreement stands in"]
        return "; ".join([*stand_in, *whether, *([" and ".join(cost)] if cost else [])])


def _told(rows: pd.DataFrame) -> pd.Series:
    return rows["p_adjusted"] < ALPHA


def _place(row: pd.Series) -> str:
    return row["gold"] if row["budget"] == ALL else f"{row['gold']} at {row['budget']}"


def _interval(row: pd.Series, digits: int = 1) -> str:
    value, lo, hi = (f"{round(row[name], digits) + 0.0:.{digits}f}" for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]"


def _names(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
