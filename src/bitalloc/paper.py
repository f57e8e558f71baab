"""The paper of a model: a LaTeX template that is filled from tables.

Prose holds for any outcome: each finding is counted here as better, worse or open by its interval, and the template
has a sentence for each. Every number in it is a cell of a table, or a count of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bitalloc.documents import Grid, grids, latex
from bitalloc.statistics import accuracies

TOLD = ("gain", "correlation", "regret")  # analyses with tables of their own
ALL, BEST, JOINT, BITS, KL = "all", "best", "optimal", "bits_only", "kl_nats_per_token"


def paper(
    model: str,
    template: str,
    *,
    inventory: pd.DataFrame,
    moments: pd.DataFrame,
    sweep: pd.DataFrame,
    sensitivity: pd.DataFrame,
    law: pd.DataFrame,
    plans: pd.DataFrame,
    checkpoints: pd.DataFrame,
    evaluate: pd.DataFrame,
    goodhart: pd.DataFrame,
    gates: pd.DataFrame,
    sentences: Sequence[str],
    captions: Mapping[str, str],
    success: pd.DataFrame,
    controls: pd.DataFrame,
    authors: Sequence[str] = (),
) -> str:
    """Tables of their names -> LaTeX. `sentences` sum up GOODHART; `captions`: name of a figure -> its caption."""
    whole = grids.stands_on(gates)
    analyses = dict(grids.goodhart_grids(goodhart, whole, whole=False))
    return latex.render(
        template,
        {
            "model": model,
            "authors": " and ".join(authors) or "bitalloc",
            "sentences": sentences,
            "captions": captions,
            "stands_on": whole,
            "early": grids.stands_on(gates, ("sweep", "fit")),
            "setup": _setup(
                inventory=inventory,
                moments=moments,
                sweep=sweep,
                sensitivity=sensitivity,
                plans=plans,
                evaluate=evaluate,
            ),
            "law": _law(law, gates),
            "uniform": _against_uniform(goodhart),
            "rank": _joint_or_bits(controls),
            "truth": _truth(goodhart),
            "limits": _limits(goodhart, gates),
            "analyses": {name: grid for name, grid in analyses.items() if name not in TOLD},
            "word": "accuracy" if len(accuracies(evaluate)) else "top-1 agreement with the unquantised model",
            "grids": {
                "success": grids.success_grid(success),
                "controls": grids.controls_grid(controls, whole),
                "plans": grids.plans_grid(plans, evaluate, checkpoints, whole),
                "gains": grids.gains_grid(goodhart, whole),
                "law": grids.law_grid(law, whole),
                "tasks": _tasks(evaluate),
                "correlations": _pooled(goodhart, "correlation", "spearman", 2),
                "regrets": _pooled(goodhart, "regret", "regret_points", 1),
            },
        },
    )


def _setup(
    *,
    inventory: pd.DataFrame,
    moments: pd.DataFrame,
    sweep: pd.DataFrame,
    sensitivity: pd.DataFrame,
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
) -> dict[str, Any]:
    claimed = inventory[inventory["claimed"]]
    offered = sweep[sweep["bits"] < 16]
    solved = plans[(plans["strategy"] == JOINT) & plans["gap"].notna()]
    texts = evaluate[(evaluate["metric"] == "ppl") & ~evaluate["task"].str.endswith("/select")]
    texts = texts[texts["suite"] == "perplexity"].drop_duplicates("task")
    spread = sensitivity.groupby("signal", sort=False)["coefficient"].agg(lambda each: each.max() / each.min())
    return {
        "weights": f"{int((claimed['rows'] * claimed['columns']).sum()):,}",
        "matrices": len(claimed),
        "blocks": claimed.loc[claimed["block"] >= 0, "block"].nunique(),
        "quantizers": sorted(offered["quantizer"].unique()),
        **{name: sorted(offered[name].unique()) for name in ("bits", "group_size", "rank")},
        "options": len(sweep.drop_duplicates(["quantizer", "bits", "group_size", "rank"])),
        "experiments": f"{len(sweep):,}",
        "tokens": f"{moments['n_tokens'].max():,}",
        "sites": len(moments),
        "spread": [(signal, f"{ratio:.3g}") for signal, ratio in spread.items()],
        "budgets": list(dict.fromkeys(grids.named(plans)["budget"])),
        "plans": len(plans),
        "pool": int((plans["strategy"] == "random").sum()),
        "gap": f"{solved['gap'].max():.2g}" if len(solved) else "",
        "proven": bool(len(solved)) and bool((solved["gap"] == 0).all()),
        "texts": [(row.task.removesuffix("/report"), row.n) for row in texts.itertuples()],
    }


def _law(law: pd.DataFrame, gates: pd.DataFrame) -> dict[str, Any]:
    pooled = law[(law["scope"] == "pooled") & law["value"].notna()].set_index(["statistic", "form"])
    fell_back = gates[(gates["gate"] == "fit") & ~gates["go"].astype(bool) & (gates["mode"] == "fallback")]

    def told(statistic: str) -> list[tuple[str, str]]:
        return [(form, grids.estimate(row, 3)) for (name, form), row in pooled.iterrows() if name == statistic]

    ranks = pooled.loc[["r2_rank"]] if "r2_rank" in pooled.index else pooled.iloc[:0]
    ranks = ranks[ranks.index.get_level_values("form") != "interpolation"]
    return {
        "r2": told("r2_log"),
        "r2_rank": told("r2_rank"),
        "fails_for_rank": [form for (_, form), row in ranks.iterrows() if row["value"] <= 0],
        "go": bool(gates.loc[gates["gate"] == "fit", "go"].all()),
        "fell_back": [f"{row.check} ({row.value:.3g}, must be {row.comparison} {row.threshold:g})"
                      for row in fell_back.itertuples()],
    }  # fmt: skip


def _against_uniform(goodhart: pd.DataFrame) -> dict[str, Any]:
    """Budgets at which `best` has a PPL below uniform's, above it, or not to be told from it."""
    rows = _gains(goodhart, BEST)
    shown = {budget: f"{budget} ({grids.estimate(row, 1, ' %')})" for budget, row in rows.items()}
    return {
        "known": bool(rows),
        "n": len(rows),
        "better": [shown[budget] for budget, row in rows.items() if row["lo"] > 0],
        "worse": [shown[budget] for budget, row in rows.items() if row["hi"] < 0],
        "open": [shown[budget] for budget, row in rows.items() if row["lo"] <= 0 <= row["hi"]],
    }


def _joint_or_bits(controls: pd.DataFrame) -> dict[str, Any]:
    """Where the joint plan and bits alone differ by their paired interval, on the first corpus, and where not."""
    rows = controls[(controls["control"] == BITS) & (controls["metric"] == KL) & (controls["status"] == "ok")]
    found: dict[str, list[str]] = {"joint": [], "bits": [], "open": []}
    for row in rows[rows["task"] == (rows["task"].iloc[0] if len(rows) else "")].to_dict("records"):
        word = "joint" if row["hi"] < 0 else "bits" if row["lo"] > 0 else "open"
        thousandths = {end: 1000 * row[end] for end in ("value", "lo", "hi")}
        found[word].append(f"{row['budget']} ({grids.estimate(thousandths, 2)})")
    return {**found, "known": any(found.values())}


def _gains(goodhart: pd.DataFrame, strategy: str) -> dict[str, dict[str, Any]]:
    rows = goodhart[(goodhart["analysis"] == "gain") & (goodhart["statistic"] == "ppl_gain_percent")]
    rows = rows[(rows["gold"] == (rows["gold"].iloc[0] if len(rows) else "")) & (rows["proxy"] == strategy)]
    return {row["budget"]: row for row in rows.to_dict("records")}


def _proxy(goodhart: pd.DataFrame) -> str:
    return next((name for name in goodhart["proxy"] if name.startswith("nll:")), "")


def _truth(goodhart: pd.DataFrame) -> dict[str, list[str]]:
    """Tasks that PPL ranks plans as, or contrary to, over all budgets; tasks that leave it open, or say nothing."""
    rows = goodhart[(goodhart["analysis"] == "correlation") & (goodhart["statistic"] == "spearman")]
    rows = rows[(rows["budget"] == ALL) & (rows["gold"] != ALL) & (rows["proxy"] == _proxy(goodhart))]
    told = rows[(rows["status"] == "ok") & rows["lo"].notna()]
    return {
        "agree": told.loc[told["hi"] < 0, "gold"].tolist(),
        "contrary": told.loc[told["lo"] > 0, "gold"].tolist(),
        "open": told.loc[(told["lo"] <= 0) & (told["hi"] >= 0), "gold"].tolist(),
        "silent": rows.loc[~rows.index.isin(told.index), "gold"].tolist(),
    }


def _limits(goodhart: pd.DataFrame, gates: pd.DataFrame) -> dict[str, Any]:
    power = goodhart[(goodhart["statistic"] == "detectable_points") & (goodhart["status"] == "ok")]
    by_task = power.groupby("gold")["value"].max()
    refused = gates[~gates["go"].astype(bool)]
    return {
        "detectable": [f"{by_task.min():.1f}", f"{by_task.max():.1f}"] if len(power) else [],
        "refused": [
            f"{row.gate}, {row.check}: {row.value:.3g}, must be {row.comparison} {row.threshold:g} "
            f"({row.mode}{'; ' + row.why if row.why else ''})"
            for row in refused.itertuples()
        ],
        "checks": len(gates),
    }  # fmt: skip


def _tasks(evaluate: pd.DataFrame) -> Grid:
    rows = accuracies(evaluate)
    rows = rows[rows["plan"] == grids.REFERENCE]
    cells = [
        (row["task"], row["suite"], str(row["n"]), f"{100 * row['chance']:.1f}" if np.isfinite(row["chance"]) else "-",
         grids.estimate({end: 100 * row[end] for end in ("value", "lo", "hi")}, 1), row["status"])
        for row in rows.to_dict("records")
    ]  # fmt: skip
    caption = "The tasks, and what the unquantised model gets right, %. A task at the floor is not above chance."
    return Grid(("task", "suite", "items", "chance", "unquantised", "status"), cells, caption)


def _pooled(goodhart: pd.DataFrame, analysis: str, statistic: str, digits: int) -> Grid:
    """One row a task, one column a proxy, over all budgets."""
    rows = goodhart[(goodhart["analysis"] == analysis) & (goodhart["statistic"] == statistic)]
    rows = rows[rows["budget"] == ALL]
    columns = list(dict.fromkeys(rows["proxy"]))
    cells = rows.set_index(["gold", "proxy"])

    def cell(task: str, proxy: str) -> str:
        if (task, proxy) not in cells.index:
            return "-"
        row = cells.loc[(task, proxy)]
        return grids.estimate(row, digits) if row["status"] == "ok" else str(row["status"])

    found = [(task, *(cell(task, proxy) for proxy in columns)) for task in dict.fromkeys(rows["gold"])]
    return Grid(("task", *(proxy.replace("nll:", "PPL ") for proxy in columns)), found)
