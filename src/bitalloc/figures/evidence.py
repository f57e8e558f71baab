"""What the main figure shows: strata of equal bytes, golds, what each plan scored, the kinds of failure in words."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bitalloc.statistics import accuracies
from bitalloc.tables import without_arms

REFERENCE, POOL, BEST, ALL = "reference", "random", "best", "all"
NO_CLAIM = {
    "floor": "at the floor: no claim",
    "saturated": "as good as the 16-bit model: no claim",
    "too_few": "too few plans",
    "missing": "not evaluated",
}


class Evidence:
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

    def curve(self, proxy: str, gold: str) -> pd.DataFrame:
        """Gold of the proxy's best of n random plans, by rising n."""
        rows = self.goodhart[self.goodhart["statistic"].str.startswith("gain_best_of_")]
        rows = rows[(rows["proxy"] == proxy) & (rows["gold"] == gold)]
        return rows.assign(n_best=rows["statistic"].str.removeprefix("gain_best_of_").astype(int)).sort_values("n_best")

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
        return f"{in_words(row, 4)} of {claimed['value']:.4f} nats"

    def _told(self, analysis: str, statistic: str, budget: str | None = None) -> str:
        rows = self.rows(statistic, analysis=analysis, proxy=self.proxy)
        rows = rows[rows["status"].eq("ok") & (True if budget is None else rows["budget"].eq(budget))]
        if rows.empty:
            return "not measured"
        told = rows[rows["p_adjusted"] < 0.05]
        where = [
            f"{r['gold']}{'' if budget else ' ' + r['budget'].replace('component ', '')} {in_words(r, 1)}"
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
        where = f"at most {in_words(row, 4)} nats there ({row['budget']})"
        return f"{where}; {self.word} differs in {told} of {len(points)} cases"

    def _turning(self) -> str:
        rows = self.rows("beta_points", proxy=self.proxy, budget=ALL)
        rows = rows[rows["status"] == "ok"]
        if rows.empty:
            return "not measured"
        turning = self.rows("turning_pressure", proxy=self.proxy, budget=ALL, status="ok")
        falls = [f"{r['gold']} falls beyond d = {in_words(r, 2)}" for _, r in turning.iterrows()]
        curves = {gold: self.curve(self.proxy, gold) for gold in rows["gold"]}
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


def in_words(row: pd.Series, digits: int) -> str:
    value, lo, hi = (f"{round(row[name], digits) + 0.0:.{digits}f}" for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]".replace("-", "\u2212")
