"""The whole Goodhart analysis on studies with a planted truth: type I errors, coverage, bias; naive estimators beside.

python benchmarks/bench_goodhart.py [--simulations 500]  ->  tables, and benchmarks/results/goodhart.json

Worlds and tasks: tests/planted.py. An interval covers when it holds the planted value; a test errs when it rejects what
was planted. Nominal are 95 % and at most 5 %; with 500 simulations an exact 95 % shows as 93.1 to 96.9.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import multivariate_normal, norm, spearmanr

sys.path.insert(0, str(Path(__file__).parent.parent))

from bitalloc.analyses.causal import mean_between
from bitalloc.analyze import analyze
from bitalloc.config import Analyze
from bitalloc.provenance import run_record
from bitalloc.statistics import mcnemar_p, spearman, split_items, winners_curse
from tests.planted import (
    BUDGETS,
    SHARED,
    TASKS,
    WORLDS,
    Plans,
    Planted,
    World,
    accuracy,
    planted,
    population,
    windows_of,
)

SETTINGS = Analyze(resamples=200, folds=10, margin=5.0)
PROXY, ALPHA = "nll:world", 0.05
NULL = ("idle", "edge", "subjects")  # inside a budget nothing is related to anything, and all plans are equal
POPULATION = (
    "spearman",
    "kendall",
    "spearman_near",
    "quadratic_points",
    "alpha_points",
    "beta_points",
    "gain_best_of_22",
)


@dataclass
class Record:
    """One simulation's answer to one question: an interval and its truth, a test of a true null, or an estimate."""

    kind: str  # interval, bound, error, naive interval, naive error, naive bias
    name: str
    value: float = np.nan
    lo: float = np.nan
    hi: float = np.nan
    truth: float = np.nan


def simulate(world: World, seed: int, truths: dict) -> Iterator[Record]:
    """All records of one simulated study."""
    study = planted(world, seed)
    results = study.results
    table = analyze(results.plans, results.evaluate, results.responses, settings=SETTINGS, seed=seed)
    rows = table.set_index(["analysis", "proxy", "gold", "budget", "statistic"]).sort_index()
    right = {
        task: dict(zip(study.latent.names, 100 * accuracy(world, study.latent, task), strict=True)) for task in TASKS
    }
    loss = dict(zip(study.latent.names, study.latent.loss_P, strict=True))

    def interval(name: str, place: tuple, truth: float, kind: str = "interval") -> Record:
        row = rows.loc[place]
        return Record(kind, name, row["value"], row["lo"], row["hi"], truth)

    # ---- over plans and items
    analyses = {"quadratic_points": "extremal", "spearman": "correlation", "kendall": "correlation"}
    for (statistic, task), truth in truths.items():
        if statistic in POPULATION and task != "edge":
            analysis = analyses.get(statistic.removesuffix("_near"), "overoptimisation")
            yield interval(f"{statistic}, {task}", (analysis, PROXY, task, "all", statistic), truth)
    for task in ("idle", "subjects"):
        for analysis, statistic in (
            ("correlation", "spearman"), ("correlation", "kendall"), ("correlation", "spearman_near"),
            ("extremal", "quadratic_points"), ("overoptimisation", "beta_points"),
        ):  # fmt: skip
            row = rows.loc[(analysis, PROXY, task, "all", statistic)]
            yield Record("error", f"{statistic} is not 0, {task}", float(row["lo"] > 0 or row["hi"] < 0))
    families = table[table["p_adjusted"].notna() & table["gold"].isin(["idle", "edge"])]
    for analysis in ("extremal", "overoptimisation"):
        part = families[families["analysis"] == analysis]
        yield Record(
            "error",
            f"any {analysis} after Benjamini-Hochberg, idle and edge",
            float((part["p_adjusted"] < ALPHA).any()),
        )

    # ---- regret
    for task in TASKS:
        picks, regrets, others = [], [], defaultdict(list)
        for budget in BUDGETS:
            names = [n for n in study.latent.names if n.endswith(budget) or f"-{budget}-" in n]
            names = [n for n in names if not n.startswith("leaked")]
            at = [study.latent.names.index(n) for n in names]
            chosen = {proxy: names[int(np.argmin(values[at]))] for proxy, values in _proxies(study).items()}
            picks.append(chosen[PROXY])
            regrets.append(max(right[task][n] for n in names) - right[task][chosen[PROXY]])
            others["kl"].append(right[task][chosen[PROXY]] - right[task][chosen["kl"]])
            others["random"].append(right[task][chosen[PROXY]] - np.mean([right[task][n] for n in names]))
            others["uniform"].append(right[task][chosen[PROXY]] - right[task][f"uniform-{budget}"])
        place = ("regret", PROXY, task, "all")
        yield interval(f"regret, {task}", (*place, "regret_points"), float(np.mean(regrets)), "bound")
        naive = np.mean(
            [rows.loc[("regret", PROXY, task, budget, "naive_regret_points"), "value"] for budget in BUDGETS]
        )
        yield Record("naive bias", f"regret on the same items, {task}", float(naive), truth=float(np.mean(regrets)))
        yield Record(
            "bias",
            f"cross-fitted regret, {task}",
            rows.loc[(*place, "regret_points"), "value"],
            truth=float(np.mean(regrets)),
        )
        for chooser, truth in others.items():
            where = ("regret", chooser, task, "all", "versus_perplexity_points")
            yield interval(f"chosen by {chooser} against PPL, {task}", where, float(np.mean(truth)))
        if task in NULL and (row := rows.loc[("regret", "kl", task, "all", "versus_perplexity_points")])["value"] != 0:
            yield Record("error", f"KL chooses otherwise than PPL, {task}", float(row["lo"] > 0 or row["hi"] < 0))

    # ---- best against uniform and the reference
    named = {}
    for budget in BUDGETS:
        best, uniform = f"optimal-{budget}", f"uniform-{budget}"
        for task in TASKS:
            place = ("gain", "best", task, budget)
            truth = right[task][best] - right[task][uniform]
            yield interval(f"points over uniform, {task}", (*place, "accuracy_points"), truth)
            truth = right[task][best] - right[task]["reference"]
            yield interval(f"points over the reference, {task}", (*place, "accuracy_points_vs_reference"), truth)
            if task in NULL:
                statistic = "clustered_p" if task == "subjects" else "mcnemar_p"
                named[task, budget] = rows.loc[(*place, statistic)]
                yield Record("error", f"{statistic}, {task}", float(named[task, budget]["value"] < ALPHA))
        yield Record(
            "naive error", "McNemar on clustered items, subjects",
            float(rows.loc[("gain", "best", "subjects", budget, "mcnemar_p"), "value"] < ALPHA),
        )  # fmt: skip
        p = rows.loc[("gain", "best", "edge", budget, "equivalence_p_vs_reference"), "value"]
        yield Record("error", "equivalence at its margin, edge", float(p < ALPHA))
        a_I, b_I = (study.measured["acc", "edge"][study.latent.names.index(n)] for n in (best, "reference"))
        same = mcnemar_p(int((a_I > b_I).sum()), int((a_I < b_I).sum())) >= ALPHA
        yield Record("naive error", "`not significant` read as `no loss`, edge", float(same))
        truth = -100 * np.expm1(loss[best] - loss[uniform])
        yield interval("PPL gain, world", ("gain", "best", "ppl:world", budget, "ppl_gain_percent"), float(truth))
        yield from _percentile_gain(study, best, uniform, float(truth))
        before, now = (norm.ppf(right["edge"][n] / 100) for n in ("reference", best))
        both = multivariate_normal.cdf([before, now], cov=[[1, SHARED], [SHARED, 1]])
        truth = right["edge"]["reference"] - 100 * float(both)
        yield interval("right to wrong, edge", ("flips", "best", "edge", budget, "right_to_wrong_percent"), truth)
        # ---- leakage
        truth = world.leak + loss[best] - loss[f"leaked-{budget}"]
        yield interval("leaked lead, nats", ("leakage", "leaked", "ppl:world", budget, "lead_nats"), truth)
        yield interval("leaked lead, points, told", ("leakage", "leaked", "told", budget, "lead_points"), 0.0)
        if not world.leak:
            row = rows.loc[("leakage", "leaked", "ppl:world", budget, "lead_nats")]
            yield Record("error", "leakage where there is none", float(row["lo"] > 0 or row["hi"] < 0))
    yield Record(
        "error", "any declared gain after Holm", float(any(row["p_adjusted"] < ALPHA for row in named.values()))
    )
    yield Record(
        "naive error", "any declared gain, uncorrected", float(any(row["value"] < ALPHA for row in named.values()))
    )

    # ---- causal
    for task in ("told", "idle"):
        place = ("causal", PROXY, task, "component attention - mlp", "matched_points")
        yield interval(f"attention - mlp at equal PPL, {task}", place, _matched(study, world, task))
        if task == "idle" or not world.gap:
            row = rows.loc[place]
            yield Record("error", f"components differ at equal PPL, {task}", float(row["lo"] > 0 or row["hi"] < 0))

    # ---- regression to the mean, windows; the truth is its mean over all simulations
    place = ("regressional", PROXY, "ppl:world", "all")
    for statistic, truth in _regressed(study, world, seed).items():
        yield interval(statistic, (*place, statistic), truth)
    for task in ("idle", "edge"):
        part = table[(table["analysis"] == "divergence") & (table["gold"] == task)].groupby("statistic")["value"].sum()
        share, expected = (part[name] / part["pairs"] for name in ("divergent_pairs", "expected_by_chance"))
        shares = table[(table["statistic"] == "divergent_share") & (table["gold"] == task)]
        yield Record("error", f"more contradictions than chance, {task}", float((shares["lo"] > ALPHA / 2).any()))
        yield Record("bias", f"share of divergent pairs, {task}, against chance", share, truth=expected)
    yield from _naive(study, truths)


def _proxies(study: Planted) -> dict[str, np.ndarray]:
    return {PROXY: study.measured["nll", "world"].mean(1), "kl": study.measured["kl", "world"].mean(1)}


def _regressed(study: Planted, world: World, seed: int, draws: int = 40) -> dict[str, float]:
    """What the choice on half of the windows claims and keeps with these plans, mean over fresh windows."""
    rng, found = np.random.default_rng([seed, 2]), []
    for budget in BUDGETS:
        at = [i for i, n in enumerate(study.latent.names) if budget in n and not n.startswith("leaked")]
        latent = Plans([study.latent.names[i] for i in at], study.latent.z_P[at], study.latent.e_P[at])
        for _ in range(draws):
            nll_PW = windows_of(world, latent, rng)["nll", "world"]
            found.append(winners_curse(nll_PW, split_items(np.zeros(nll_PW.shape[1]), 4, rng)))
    claimed, kept = np.mean(found, axis=0)
    return {"claimed_nats": claimed, "kept_nats": kept, "shrinkage_nats": claimed - kept}


def _matched(study: Planted, world: World, task: str) -> float:
    """Of the curves without noise."""
    found = []
    for component in ("attention", "mlp"):
        at = [i for i, name in enumerate(study.latent.names) if name == "reference" or f"component-{component}" in name]
        right_P = 100 * accuracy(world, study.latent, task)[at]
        found.append(mean_between(study.latent.loss_P[at][None], right_P[None], np.linspace(0, 0.2, 21)[1:])[0])
    return float(found[0] - found[1])


def _percentile_gain(study: Planted, best: str, uniform: str, truth: float) -> Iterator[Record]:
    rng = np.random.default_rng(0)
    a_W, b_W = (study.measured["nll", "world"][study.latent.names.index(name)] for name in (best, uniform))
    drawn_RW = rng.integers(len(a_W), size=(400, len(a_W)))
    lo, hi = np.quantile(-100 * np.expm1((a_W - b_W)[drawn_RW].mean(1)), [0.025, 0.975])
    yield Record(
        "naive interval", "PPL gain, percentiles of 24 windows", -100 * np.expm1((a_W - b_W).mean()), lo, hi, truth
    )


def _naive(study: Planted, truths: dict) -> Iterator[Record]:
    """What is often done instead."""
    rng = np.random.default_rng(0)
    names = [n for n in study.latent.names if n.startswith(("random", "uniform", "optimal"))]
    at = [study.latent.names.index(n) for n in names]
    budget_P = np.array([n.split("-")[1] for n in names])
    x_PW = study.measured["nll", "world"][at]
    for task in ("told", "idle"):
        y_PI = study.measured["acc", task][at]
        # all budgets in one correlation: bytes move both
        p = spearmanr(x_PW.mean(1), y_PI.mean(1)).pvalue
        if task == "idle":
            yield Record("naive error", "one rho over all budgets is not 0, idle", float(p < ALPHA))
        # items drawn anew and percentiles taken; and plans, too
        windows, items = (rng.multinomial(n, [1 / n] * n, size=200) / n for n in (x_PW.shape[1], y_PI.shape[1]))
        x_RP, y_RP = windows @ x_PW.T, items @ y_PI.T
        found = {"items alone": [], "plans and items": []}
        for budget in BUDGETS:
            inside = budget_P == budget
            drawn = rng.integers(inside.sum(), size=(200, inside.sum()))
            x, y = x_RP[:, inside], y_RP[:, inside]
            found["items alone"].append(spearman(x, y))
            found["plans and items"].append(spearman(*(np.take_along_axis(each, drawn, 1) for each in (x, y))))
        value = np.mean(
            [spearman(x_PW[budget_P == b].mean(1)[None], y_PI[budget_P == b].mean(1)[None])[0] for b in BUDGETS]
        )
        for how, rho in found.items():
            lo, hi = np.quantile(np.mean(rho, axis=0), [0.025, 0.975])
            yield Record(
                "naive interval", f"spearman, percentiles over {how}, {task}", value, lo, hi, truths["spearman", task]
            )
    for task in ("subjects",):
        a_I, b_I = (
            study.measured["acc", task][study.latent.names.index(f"{s}-2.6bpw")] for s in ("optimal", "uniform")
        )
        difference_R = 100 * (a_I - b_I)[rng.integers(len(a_I), size=(400, len(a_I)))].mean(1)
        lo, hi = np.quantile(difference_R, [0.025, 0.975])
        yield Record(
            "naive interval",
            "points over uniform, items drawn one by one, subjects",
            100 * (a_I - b_I).mean(),
            lo,
            hi,
            0.0,
        )
    claimed, kept = [], []
    for budget in BUDGETS:
        inside = np.flatnonzero(budget_P == budget)
        pick = inside[np.argmin(x_PW[inside].mean(1))]
        claimed.append(x_PW[inside].mean() - x_PW[pick].mean())
        kept.append(study.latent.loss_P[at][inside].mean() - study.latent.loss_P[at][pick])
    yield Record(
        "naive bias", "gain in nats on the windows that chose", float(np.mean(claimed)), truth=float(np.mean(kept))
    )


def summed(records: list[tuple[str, Record]]) -> pd.DataFrame:
    """A row for each world, kind and name: coverage and the share of misses on each side, error rate, bias."""
    frame = pd.DataFrame([{"world": world, **vars(record)} for world, record in records])
    expected = frame.groupby(["world", "kind", "name"])["value"].transform("mean")
    frame["truth"] = frame["truth"].fillna(expected)
    rows = []
    for (world, kind, name), part in frame.groupby(["world", "kind", "name"], sort=False):
        row = {"world": world, "kind": kind, "name": name, "n": len(part)}
        if "error" in kind:
            row["rate"] = part["value"].mean()
        else:
            row |= {
                "value": part["value"].mean(),
                "truth": part["truth"].mean(),
                "bias": (part["value"] - part["truth"]).mean(),
            }
            if "interval" in kind or kind == "bound":
                below, above = (part["truth"] < part["lo"]).mean(), (part["truth"] > part["hi"]).mean()
                row |= {"below": below, "above": above, "rate": 1 - below - (0 if kind == "bound" else above)}
                row["width"] = (part["hi"] - part["lo"]).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def nominal(row: pd.Series) -> bool:
    """Within 2.6 standard errors of 95 % or of 5 %, or on the safe side."""
    if "error" in row["kind"]:
        return row["rate"] <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / row["n"])
    target = 0.975 if row["kind"] == "bound" else 0.95
    return row["rate"] >= target - 2.6 * np.sqrt(target * (1 - target) / row["n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulations", type=int, default=500, help="of each world")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS))
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/goodhart.json")
    arguments = parser.parse_args()
    records: list[tuple[str, Record]] = []
    start = time.perf_counter()
    for name in arguments.worlds:
        truths = population(WORLDS[name])
        for seed in range(arguments.first, arguments.first + arguments.simulations):
            records += [(name, record) for record in simulate(WORLDS[name], seed, truths)]
        print(f"{name}: {arguments.simulations} studies, {time.perf_counter() - start:.0f} s so far", flush=True)
        table = written(records, arguments, time.perf_counter() - start)
    with pd.option_context("display.width", 200, "display.max_rows", None, "display.max_colwidth", 70):
        print(table.drop(columns=["width"]).round(3).to_string(index=False, na_rep=""))


def written(records: list[tuple[str, Record]], arguments: argparse.Namespace, wall_s: float) -> pd.DataFrame:
    """The table so far, and in the file."""
    table = summed(records)
    rated = table[table["rate"].notna()]
    table.loc[rated.index, "nominal"] = rated.apply(nominal, axis=1)
    settings = SETTINGS.model_dump() | {"simulations": arguments.simulations, "wall_s": round(wall_s)}
    rows = json.loads(table.round(5).to_json(orient="records"))
    record = run_record("numpy", "scipy", "pandas")
    arguments.output.write_text(json.dumps({"record": record, "settings": settings, "rows": rows}, indent=1) + "\n")
    return table


if __name__ == "__main__":
    main()
