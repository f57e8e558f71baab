"""The table in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bitalloc.analyze.study import ACC, ALL, ALPHA, BEST, POOL, UNIFORM


def summary(goodhart: pd.DataFrame, evaluate: pd.DataFrame, plans: pd.DataFrame) -> list[str]:
    """Two to four plain sentences from the cells of GOODHART, the message first; no claim beyond an interval."""
    word = "accuracy" if (evaluate["metric"] == ACC).any() else "top-1 agreement"
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
