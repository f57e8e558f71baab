"""Did the proxy tell the truth? Perplexity, KL and the predicted objective against what one cares about.

Inside strata of equal bytes: rank correlations, cross-fitted selection regret, gains over uniform, pairs of
plans in which perplexity and a task contradict each other, and the power that the items had to show any of it.

Golds are the accuracies of the tasks; where no task was run, top-1 agreement with the reference stands in,
without tests of significance. Shapes: P plans, I items (or windows), R bootstrap resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from bitalloc.config import Analyze
from bitalloc.errors import BitallocError
from bitalloc.statistics import (
    Scores,
    accuracies,
    cross_fitted_regret,
    detectable_points,
    fisher_interval,
    holm,
    mcnemar_p,
    naive_regret,
    resample,
    spearman,
    split_items,
)
from bitalloc.tables import GOODHART, without_arms

NLL, KL, ACC, TOP1 = "nll_nats_per_token", "kl_nats_per_token", "acc", "top1"
REFERENCE, UNIFORM, BEST, POOL = "reference", "uniform", "best", "random"
ALL = "all"
ALPHA = 0.05
MIN_PLANS = 8  # fewer cannot place a rank correlation anywhere
BETTER_PPL = 0.01  # share by which one plan's PPL must be below another's to call it better
SATURATED = 0.01  # accuracy within which all plans equal the reference

# plans -> (proxy_P, its bootstrap proxy_RP; None for what is not measured on a sample)
Proxy = Callable[[list[str]], tuple[np.ndarray, np.ndarray | None]]


def analyze(
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    responses: pd.DataFrame,
    *,
    settings: Analyze,
    seed: int,
) -> pd.DataFrame:
    """PLANS, EVALUATE and RESPONSES -> GOODHART.

    Raises `BitallocError` when there is nothing to analyse or when responses cannot be paired.
    """
    study = _Study(plans, responses, floors(evaluate), settings, seed)
    for analysis in (study.correlation, study.regret, study.gain, study.divergence, study.power):
        analysis()
    return pd.DataFrame(study.rows)[[column.name for column in GOODHART.columns]]


def floors(evaluate: pd.DataFrame) -> set[str]:
    """Tasks in which the reference is not above chance."""
    rows = accuracies(evaluate)
    return set(rows.loc[(rows["plan"] == REFERENCE) & (rows["status"] == "floor"), "task"])


def scores(responses: pd.DataFrame, metric: str) -> dict[str, Scores]:
    """Task, or corpus without its split, -> responses of one metric on the report split, paired over plans.

    An item of lm-eval that failed with one plan is left out with all.
    """
    found = {}
    rows = responses[(responses["metric"] == metric) & ~responses["task"].str.endswith("/select")]
    for task, part in rows.groupby("task", sort=False):
        table = part.pivot(index="plan", columns="item", values="value")
        if (part["suite"] == "downstream").all():
            table = table.dropna(axis=1)
        if table.empty or table.isna().to_numpy().any():
            raise BitallocError(
                f"responses: some plans lack items of {task} ({metric}), so they cannot be paired; rerun evaluate"
            )
        items = part.drop_duplicates("item").set_index("item").loc[table.columns]
        found[str(task).removesuffix("/report")] = Scores(
            plans=tuple(table.index),
            values_PI=table.to_numpy(),
            weight_I=items["weight"].to_numpy(dtype=float),
            group_I=pd.factorize(items["group"])[0],
        )
    return found


class _Study:
    """Collects the rows of GOODHART. One resampling of a set of items serves every analysis of it."""

    def __init__(
        self, plans: pd.DataFrame, responses: pd.DataFrame, floors: set[str], settings: Analyze, seed: int
    ) -> None:
        self.settings, self.seed, self.floors, self.rows = settings, seed, floors, []
        self.nll, self.tasks = scores(responses, NLL), scores(accuracies(responses), ACC)
        if not self.nll:
            raise BitallocError(f"responses hold no {NLL} of the report split: add the suite perplexity to evaluate")
        self.golds = self.tasks or scores(responses, TOP1)
        kl = {f"kl:{name}": each for name, each in scores(responses, KL).items()}
        sets = {f"nll:{name}": each for name, each in self.nll.items()} | kl | self.golds
        measured = set.intersection(*(set(each.plans) for each in sets.values()))
        self.plans = without_arms(plans[plans["plan"].isin(measured)])
        if self.plans.empty:
            raise BitallocError("no plan has responses in every suite: run evaluate before analyze")
        # the winner is a copy of another plan, and a plan under two names would count twice
        distinct = self.plans.drop_duplicates(["budget", "nbytes", "objective"])
        self.strata = {str(budget): part["plan"].tolist() for budget, part in distinct.groupby("budget", sort=False)}
        self.counts = {name: resample(each.group_I, settings.resamples, self.rng(name)) for name, each in sets.items()}
        objective = self.plans.set_index("plan")["objective"]
        self.proxies: dict[str, Proxy] = {name: self._mean(sets, [name]) for name in sets if name.startswith("nll:")}
        if kl:
            self.proxies["kl"] = self._mean(sets, list(kl))
        self.proxies["objective"] = lambda names: (objective.loc[names].to_numpy(), None)

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])

    def _mean(self, sets: dict[str, Scores], members: list[str]) -> Proxy:
        def proxy(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
            point_P = np.mean([sets[name].means(names) for name in members], axis=0)
            return point_P, np.mean([sets[name].resampled(names, self.counts[name]) for name in members], axis=0)

        return proxy

    def add(self, analysis: str, statistic: str, value: float, **row: object) -> None:
        """A row; what is not given is missing, and the status follows from gold and budget."""
        given = {"analysis": analysis, "statistic": statistic, "value": value, **row}
        blank = {"lo": np.nan, "hi": np.nan, "p_adjusted": np.nan}
        self.rows.append({**blank, "status": self.status(str(row["gold"]), str(row["budget"])), **given})

    def status(self, gold: str, budget: str) -> str:
        if gold in self.floors:
            return "floor"
        if gold not in self.golds:
            return "ok"
        task = self.golds[gold]
        names = list(itertools.chain(*self.strata.values())) if budget == ALL else self.strata[budget]
        reference = task.means([REFERENCE])[0] if REFERENCE in task.plans else 1.0
        return "saturated" if np.abs(task.means(names) - reference).max() <= SATURATED else "ok"

    def correlation(self) -> None:
        """Spearman's rho of proxy and gold over the plans of a stratum, and its mean over the strata.

        Two-level bootstrap: plans are resampled within their stratum, items and windows over all of them.
        """
        drawn = {
            budget: self.rng(f"plans {budget}").integers(len(names), size=(self.settings.resamples, len(names)))
            for budget, names in self.strata.items()
        }
        for (proxy, values), (gold, task) in itertools.product(self.proxies.items(), self.golds.items()):
            pooled = []
            for budget, names in self.strata.items():
                proxy_P, proxy_RP = values(names)
                gold_RP = task.resampled(names, self.counts[gold])
                proxy_RP = np.broadcast_to(proxy_P, gold_RP.shape) if proxy_RP is None else proxy_RP
                rho = float(spearman(proxy_P[None], task.means(names)[None])[0])
                rho_R = spearman(*(np.take_along_axis(each, drawn[budget], 1) for each in (proxy_RP, gold_RP)))
                stratum = (rho, rho_R, len(names))
                self._correlation_row(proxy, gold, budget, [stratum])
                if len(names) >= MIN_PLANS and np.isfinite(rho):
                    pooled.append(stratum)
            self._correlation_row(proxy, gold, ALL, pooled)

    def _correlation_row(self, proxy: str, gold: str, budget: str, strata: list[tuple]) -> None:
        row = {"proxy": proxy, "gold": gold, "budget": budget, "n": sum(n for *_, n in strata)}
        rho = float(np.mean([rho for rho, *_ in strata])) if strata else np.nan
        if row["n"] >= MIN_PLANS:
            row["lo"], row["hi"] = fisher_interval(rho, np.mean([rho_R for _, rho_R, _ in strata], axis=0))
        elif self.status(gold, budget) == "ok":
            row["status"] = "too_few"
        self.add("correlation", "spearman", rho, **row)

    def regret(self) -> None:
        """Points of the gold that are lost by choosing with the proxy, at random, or uniform."""
        for gold, task in self.golds.items():
            half_FI = split_items(task.group_I, self.settings.folds, self.rng(f"folds {gold}"))
            pooled: dict[str, list[np.ndarray]] = {}
            for budget, names in self.strata.items():
                if len(names) < 2:
                    continue
                gold_PI = np.stack([task.of(name) for name in names])
                for proxy, pick_P in self._picks(names):
                    place = {"proxy": proxy, "gold": gold, "budget": budget}
                    regret_I = cross_fitted_regret(gold_PI, pick_P, half_FI)
                    self._regret_row(regret_I, **place)
                    self.add("regret", "naive_regret_points", naive_regret(gold_PI, pick_P), n=len(names), **place)
                    pooled.setdefault(proxy, []).append(regret_I)
            for proxy, regrets in pooled.items():
                self._regret_row(np.mean(regrets, axis=0), proxy=proxy, gold=gold, budget=ALL)

    def _picks(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Who chooses, and the weight that each plan gets in the choice."""
        for proxy, values in self.proxies.items():
            yield proxy, np.eye(len(names))[np.argmin(values(names)[0])]
        yield POOL, np.full(len(names), 1 / len(names))
        uniform = self.plans.loc[self.plans["strategy"] == UNIFORM, "plan"]
        at = [position for position, name in enumerate(names) if name in set(uniform)]
        if at:
            yield UNIFORM, np.eye(len(names))[at[0]]

    def _regret_row(self, regret_I: np.ndarray, **place: str) -> None:
        counts_RI = self.counts[place["gold"]]
        lo, hi = _ends(counts_RI @ regret_I / counts_RI.sum(1))
        self.add("regret", "regret_points", float(regret_I.mean()), lo=lo, hi=hi, n=len(regret_I), **place)

    def gain(self) -> None:
        """Every named strategy against uniform at equal bytes, and against the reference.

        The primary tests, declared here and nowhere else, are best against uniform in every task at every
        budget: their exact McNemar p-values carry Holm's correction.
        """
        named = self.plans[self.plans["strategy"] != POOL]
        uniform = named[named["strategy"] == UNIFORM].drop_duplicates("budget").set_index("budget")["plan"]
        for plan, strategy, budget in zip(named["plan"], named["strategy"], named["budget"], strict=True):
            other = uniform.get(budget) if strategy != UNIFORM else None
            place = {"proxy": strategy, "budget": str(budget)}
            for corpus, nll in self.nll.items():
                self._perplexity(nll, self.counts[f"nll:{corpus}"], plan, other, gold=f"ppl:{corpus}", **place)
            for gold, task in self.golds.items():
                self._accuracy(task, self.counts[gold], plan, other, gold=gold, **place)
                if gold in self.tasks and other is not None:
                    a_I, b_I = task.of(plan), task.of(other)
                    p = float(mcnemar_p(int((a_I > b_I).sum()), int((a_I < b_I).sum())))
                    self.add("gain", "mcnemar_p", p, n=len(a_I), gold=gold, **place)
        primaries = [row for row in self.rows if row["statistic"] == "mcnemar_p" and row["proxy"] == BEST]
        for row, adjusted in zip(primaries, holm([row["value"] for row in primaries]), strict=True):
            row["p_adjusted"] = adjusted

    def _perplexity(self, nll: Scores, counts_RI: np.ndarray, plan: str, uniform: str | None, **place: str) -> None:
        """100 (1 - PPL / PPL_uniform) percent and nats above the reference, paired over windows."""
        against = {
            "nats_above_reference": (REFERENCE if REFERENCE in nll.plans else None, lambda nats: nats),
            "ppl_gain_percent": (uniform, lambda nats: -100 * np.expm1(nats)),
        }
        for statistic, (other, scale) in against.items():
            if other is not None:
                lo, hi = _ends(scale(nll.resampled([plan], counts_RI) - nll.resampled([other], counts_RI)))
                value = float(scale(nll.means([plan]) - nll.means([other]))[0])
                self.add("gain", statistic, value, lo=lo, hi=hi, n=len(nll.weight_I), **place)

    def _accuracy(self, task: Scores, counts_RI: np.ndarray, plan: str, uniform: str | None, **place: str) -> None:
        """Points of accuracy against uniform and against the reference, paired over items."""
        against = {"accuracy_points": uniform, "accuracy_points_vs_reference": REFERENCE}
        for statistic, other in against.items():
            if other in task.plans:
                lo, hi = _ends(100 * (task.resampled([plan], counts_RI) - task.resampled([other], counts_RI)))
                value = float(100 * (task.means([plan]) - task.means([other]))[0])
                self.add("gain", statistic, value, lo=lo, hi=hi, n=len(task.weight_I), **place)

    def divergence(self) -> None:
        """Pairs of one budget whose first plan is better by more than 1 % of PPL: is its accuracy significantly
        worse (exact McNemar, 5 %)? Were there no difference, half of the 5 % would say so at most.
        """
        corpus, nll = next(iter(self.nll.items()))
        for (gold, task), (budget, names) in itertools.product(self.tasks.items(), self.strata.items()):
            place = {"proxy": f"nll:{corpus}", "gold": gold, "budget": budget, "n": len(names)}
            nll_P, only_PP = nll.means(names), _only(task, names)
            better_PP = -np.expm1(nll_P[:, None] - nll_P) > BETTER_PPL
            worse_PP = better_PP & (only_PP < only_PP.T) & (mcnemar_p(only_PP, only_PP.T) < ALPHA)
            pairs, divergent = float(better_PP.sum()), float(worse_PP.sum())
            self.add("divergence", "pairs", pairs, **place)
            self.add("divergence", "divergent_pairs", divergent, **place)
            self.add("divergence", "expected_by_chance", ALPHA / 2 * pairs, **place)
            if pairs:
                counts_RP = resample(np.zeros(len(names)), self.settings.resamples, self.rng(f"pairs {budget}"))
                all_R, worse_R = ((counts_RP @ each * counts_RP).sum(1) for each in (better_PP, worse_PP))
                lo, hi = _ends(worse_R[all_R > 0] / all_R[all_R > 0])
                self.add("divergence", "divergent_share", divergent / pairs, lo=lo, hi=hi, **place)

    def power(self) -> None:
        """What a test over these items could see, from the mean discordance of two plans of a stratum."""
        for (gold, task), (budget, names) in itertools.product(self.tasks.items(), self.strata.items()):
            if len(names) > 1:
                n = len(task.weight_I)
                only_PP = _only(task, names)
                q = float((only_PP + only_PP.T)[np.triu_indices(len(names), 1)].mean() / n)
                place = {"proxy": ALL, "gold": gold, "budget": budget, "n": n}
                self.add("power", "discordant_share", q, **place)
                self.add("power", "detectable_points", detectable_points(q, n), **place)


def _only(task: Scores, names: list[str]) -> np.ndarray:
    """Items that the plan of the row gets right and the plan of the column does not."""
    right_PI = np.stack([task.of(name) for name in names])
    return right_PI @ (1 - right_PI).T


def _ends(values_R: np.ndarray) -> tuple[float, float]:
    lo, hi = np.quantile(values_R, [ALPHA / 2, 1 - ALPHA / 2])
    return float(lo), float(hi)


# ---- the table in plain sentences --------------------------------------------------------------
def summary(
    goodhart: pd.DataFrame, evaluate: pd.DataFrame, plans: pd.DataFrame, gates: pd.DataFrame | None = None
) -> list[str]:
    """Two to five plain sentences from the cells of GOODHART, the message first; no claim beyond an interval.

    Where GATES says that nothing was to be gained over uniform, that is the message.
    """
    return [*_near_uniform(gates), *_findings(goodhart, evaluate, plans)]


def _near_uniform(gates: pd.DataFrame | None) -> list[str]:
    if gates is None:
        return []
    rows = gates[(gates["check"] == "objective_gap") & (gates["mode"] == "fallback") & ~gates["go"].astype(bool)]
    return [
        f"Uniform is near-optimal: the optimal plan lowers the predicted KL by {row.value:.1%} at most "
        f"(criterion {row.threshold:.1%}), so the random pool was not evaluated."
        for row in rows.itertuples()
    ]


def _findings(goodhart: pd.DataFrame, evaluate: pd.DataFrame, plans: pd.DataFrame) -> list[str]:
    word = "accuracy" if len(accuracies(evaluate)) else "top-1 agreement"
    proxy = next((name for name in goodhart["proxy"] if name.startswith("nll:")), "")
    rows = goodhart[(goodhart["analysis"] == "correlation") & (goodhart["proxy"] == proxy)]
    pooled = rows[(rows["budget"] == ALL) & (rows["status"] == "ok") & rows["lo"].notna()]
    gain, regret, limits = _gain(goodhart, word), _regret(goodhart, proxy, word), _limits(goodhart, rows)
    if pooled.empty:
        few = f"Too few plans ({len(plans)}), or no task with a signal, to relate PPL to {word}."
        return [*gain, few, *regret, *limits]
    return [_agreement(rows, pooled, word), *regret, *gain, *limits]


def _interval(row: pd.Series, digits: int = 1) -> str:
    value, lo, hi = (f"{round(row[name], digits) + 0.0:.{digits}f}" for name in ("value", "lo", "hi"))
    return f"{value} [{lo}, {hi}]"


def _names(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _agreement(rows: pd.DataFrame, pooled: pd.DataFrame, word: str) -> str:
    shown = {row["gold"]: f"{row['gold']} (rho {_interval(row, 2)})" for _, row in pooled.iterrows()}
    verdicts = (
        (pooled["hi"] < 0, "PPL and {word} agree on {names}"),
        (pooled["lo"] > 0, "lower PPL goes with lower {word} on {names}"),
        ((pooled["lo"] <= 0) & (pooled["hi"] >= 0), "on {names} the interval covers 0: nothing can be said"),
    )
    parts = [
        text.format(word=word, names=_names([shown[gold] for gold in pooled.loc[mask, "gold"]]))
        for mask, text in verdicts
        if mask.any()
    ]
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _regret(goodhart: pd.DataFrame, proxy: str, word: str) -> list[str]:
    rows = goodhart[(goodhart["statistic"] == "regret_points") & (goodhart["budget"] == ALL)]
    rows = rows[rows["status"] == "ok"]
    chosen = rows[rows["proxy"] == proxy]
    if chosen.empty:
        return []
    worst = chosen.loc[chosen["value"].idxmax()]
    others = rows[rows["gold"] == worst["gold"]].set_index("proxy")
    yardsticks = [f"{label} {_interval(others.loc[name])}" for name, label in
                  ((POOL, "a random plan"), (UNIFORM, "uniform")) if name in others.index]  # fmt: skip
    told = "" if worst["lo"] > 0 else ", not to be told from 0"
    return [
        f"Choosing by PPL costs at most {_interval(worst)} points of {word} ({worst['gold']}) against the cross-fitted "
        f"best plan{told}; {', '.join(yardsticks)}."
    ]


def _gain(goodhart: pd.DataFrame, word: str) -> list[str]:
    best = goodhart[(goodhart["analysis"] == "gain") & (goodhart["proxy"] == BEST)]
    ppl = best[best["statistic"] == "ppl_gain_percent"]
    if ppl.empty:
        return []
    ppl = ppl[ppl["gold"] == ppl["gold"].iloc[0]]
    sentence = "At equal bytes best changes PPL against uniform by " + _names(
        [f"{-row['value']:.1f} % [{-row['hi']:.1f}, {-row['lo']:.1f}] at {row['budget']}" for _, row in ppl.iterrows()]
    )
    tests = best[(best["statistic"] == "mcnemar_p") & (best["status"] == "ok")]
    if tests.empty:
        return [sentence + "."]
    points = best[best["statistic"] == "accuracy_points"].set_index(["gold", "budget"])
    found = [
        f"{row['gold']} at {row['budget']} ({points.loc[(row['gold'], row['budget']), 'value']:+.1f} points)"
        for _, row in tests[tests["p_adjusted"] < ALPHA].iterrows()
    ]
    outcome = f"{word} differs significantly on {_names(found)}" if found else f"no difference in {word} is significant"
    return [f"{sentence}; after Holm's correction {outcome}."]


def _limits(goodhart: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What the table cannot say: budgets by themselves, tasks without a signal, differences that are too small."""
    parts = []
    told = rows[(rows["status"] == "ok") & ((rows["hi"] < 0) | (rows["lo"] > 0))]
    settled = told.loc[told["budget"] == ALL, "gold"]
    inside = rows[(rows["budget"] != ALL) & rows["gold"].isin(settled) & (rows["status"] == "ok")]
    open_ = inside[~inside.index.isin(told.index)]
    if len(open_):
        parts.append("taken by itself, not settled at " + _names(open_["budget"] + " (" + open_["gold"] + ")"))
    whole = goodhart[(goodhart["analysis"] == "correlation") & (goodhart["budget"] == ALL)]
    for status, meaning in (("floor", "not above chance in the reference"), ("saturated", "as good as the reference")):
        names = whole.loc[whole["status"] == status, "gold"]
        if len(names):
            parts.append(f"{_names(names)}: {meaning}, so no claim")
    power = goodhart[(goodhart["statistic"] == "detectable_points") & (goodhart["status"] == "ok")]
    if len(power):
        by_task = power.groupby("gold", sort=False)["value"].max()
        ends = sorted({f"{by_task.min():.1f}", f"{by_task.max():.1f}"}, key=float)
        parts.append(f"differences below about {' to '.join(ends)} points cannot be seen with so many items")
    sentence = "; ".join(parts)
    return [sentence[0].upper() + sentence[1:] + "."] if parts else []
