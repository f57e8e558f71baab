"""What was promised and what was reached: three criteria at three levels, from the tables of the analysis and the fit.

Gain of `best` over uniform in perplexity at equal bytes, accuracy that `best` loses to the reference, and R^2 of the
error law. A value reaches a level when it is at least there; it does so for sure when the whole 95 % interval is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from bitalloc.statistics import accuracies
from bitalloc.tables import SUCCESS

LEVELS = ("minimal", "target", "stretch")
THRESHOLDS = {
    "ppl_gain_percent": (3.0, 5.0, 15.0),
    "accuracy_drop_points": (5.0, 2.0, 1.0),
    "r2_log": (0.6, 0.8, 0.9),
    "r2_loo": (0.6, 0.8, 0.9),
}
UNIT = {"ppl_gain_percent": "%", "accuracy_drop_points": "points"}
STANDS_ON = {  # criterion -> the gates before it
    "ppl_gain_percent": ("sweep", "fit", "allocate", "pilot", "compress"),
    "accuracy_drop_points": ("sweep", "fit", "allocate", "pilot", "compress", "downstream"),
    "r2_log": ("sweep", "fit"),
    "r2_loo": ("sweep", "fit"),
}
BEST, ALL = "best", "all"
Row = dict[str, object]


def success(
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    goodhart: pd.DataFrame,
    law: pd.DataFrame,
    gates: pd.DataFrame,
    *,
    form: str,
) -> pd.DataFrame:
    """PLANS, EVALUATE, GOODHART, LAW and GATES -> SUCCESS.

    Perplexity counts on every report corpus, at every budget of `best`. Of the tasks that are above chance the one
    counts in which most is lost, so its interval is that of one task, not of the worst of several. The law is the one
    that the configuration names (`form`), in sample and with each option left out. What was not measured is a row too,
    without a value.
    """
    budgets = list(dict.fromkeys(plans.loc[plans["strategy"] == BEST, "budget"]))
    gain = goodhart[(goodhart["analysis"] == "gain") & (goodhart["proxy"] == BEST)]
    tasks = gain[gain["gold"].isin(accuracies(evaluate)["task"])]  # agreement with the reference stands in for none
    rows = [*_perplexity(gain, budgets), *_accuracy(tasks, budgets), *_law(law, form)]
    frame = pd.DataFrame([_judged(row, gates) for row in rows])
    return frame[SUCCESS.names]


def _perplexity(gain: pd.DataFrame, budgets: Sequence[str]) -> Iterator[Row]:
    gains = gain[gain["statistic"] == "ppl_gain_percent"]
    for budget in budgets:
        found = gains[gains["budget"] == budget]
        for row in found.to_dict("records"):
            yield _row("ppl_gain_percent", budget, row["gold"].removeprefix("ppl:"), row)
        if found.empty:
            yield _row("ppl_gain_percent", budget, ALL, {}, status="no uniform plan to compare with")


def _accuracy(gain: pd.DataFrame, budgets: Sequence[str]) -> Iterator[Row]:
    drops = gain[gain["statistic"] == "accuracy_points_vs_reference"]
    for budget in budgets:
        found = drops[(drops["budget"] == budget) & drops["value"].notna()]
        able = found[found["status"] != "floor"]
        if able.empty:
            status = "no task above chance" if len(found) else "no task was run"
            yield _row("accuracy_drop_points", budget, ALL, {}, status=status)
            continue
        worst = able.loc[able["value"].idxmin()]
        # 0 - x: the negative of 0 would be written as -0
        lost = {"value": 0 - worst["value"], "lo": 0 - worst["hi"], "hi": 0 - worst["lo"], "n": worst["n"]}
        yield _row("accuracy_drop_points", budget, worst["gold"], lost)


def _law(law: pd.DataFrame, form: str) -> Iterator[Row]:
    pooled = law[(law["form"] == form) & (law["scope"] == "pooled")].set_index("statistic")
    for statistic in ("r2_log", "r2_loo"):
        known = statistic in pooled.index and pd.notna(pooled.loc[statistic, "value"])
        found = pooled.loc[statistic].to_dict() if known else {}
        yield _row(statistic, ALL, form, found, status="ok" if known else "not defined")


def _row(criterion: str, budget: str, gold: str, found: Row, *, status: str = "ok") -> Row:
    measured = {name: found.get(name, float("nan")) for name in ("value", "lo", "hi")}
    return {
        "criterion": criterion,
        "budget": budget,
        "gold": gold,
        **measured,
        "n": int(found.get("n", 0)),
        "status": status,
    }


def _judged(row: Row, gates: pd.DataFrame) -> Row:
    name = str(row["criterion"])
    levels = THRESHOLDS[name]
    falling = levels[0] > levels[-1]
    return {
        **row,
        "unit": UNIT.get(name, "1"),
        "comparison": "<=" if falling else ">=",
        **dict(zip(LEVELS, levels, strict=True)),
        "level": level(row["value"], levels),
        "level_sure": level(row["hi" if falling else "lo"], levels),
        "verdicts": _verdicts(gates[gates["gate"].isin(STANDS_ON[name])]),
    }


def level(value: float, levels: Sequence[float]) -> str:
    """The highest level that a value reaches, none for a missing one; levels fall where less is better.

    >>> level(6.0, (3.0, 5.0, 15.0)), level(1.5, (5.0, 2.0, 1.0)), level(7.0, (5.0, 2.0, 1.0))
    ('target', 'target', 'none')
    """
    falling = levels[0] > levels[-1]
    reached = [value <= each if falling else value >= each for each in levels]
    return LEVELS[sum(reached) - 1] if any(reached) else "none"


def _verdicts(gates: pd.DataFrame) -> str:
    """How many checks say GO, and every NO-GO with what it does."""
    refused = gates[~gates["go"].astype(bool)]
    named = [f"NO-GO {row.check} ({row.mode})" for row in refused.itertuples()]
    return "; ".join([f"{len(gates) - len(refused)} of {len(gates)} GO", *named])
