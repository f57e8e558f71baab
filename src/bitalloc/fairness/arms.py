"""What is compared at one budget, and the tables that say how it came out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bitalloc.fairness.damage import ALL, ENGLISH, NONE, REFERENCE, Damage, Row, synergy
from bitalloc.fairness.search import Choice, Units, winner
from bitalloc.statistics import mean_interval, resample, share_interval
from bitalloc.statistics.intervals import PSEUDO_ITEMS
from bitalloc.tables import ARMS, FAIRNESS, PROTECTED, SETS, SYNERGY

FAIR, ENGLISH_ONLY, PATTERN, ALLOCATOR, RANDOM = "fair", "english", "pattern", "allocator", "random"


def plan_arms(damage: Damage, plans: pd.DataFrame, *, margin: float) -> pd.DataFrame:
    """ARMS of the rows of PLANS at one budget. `damage`: what they do on the select split.

    Additive costs only propose: fair is whichever of the plans fair, english, optimal and uniform has the least
    worst_rel as measured, English within `margin` of what it loses under the plan that ignores languages.
    """
    at = plans.drop_duplicates("strategy").set_index("strategy")["plan"]
    entrants = [at[name] for name in ("fair", "english", "optimal", "uniform") if name in at]
    unknown, rows = math.nan, []
    if damage.ranked:
        chosen, share = winner(damage, entrants, damage.ranked, margin=margin, base=at["optimal"])
        rows.append(
            (FAIR, chosen, share[chosen], f"least worst_rel of {len(entrants)} plans, English within {margin:g}")
        )
    named = {
        "english": (ENGLISH_ONLY, "least predicted damage to English"),
        "uniform": ("uniform", "one option for all"),
    }
    named["optimal"] = ALLOCATOR, "least predicted damage, languages ignored"
    rows += [(arm, at[name], unknown, note) for name, (arm, note) in named.items() if name in at]
    drawn = plans.loc[plans["strategy"] == "random", "plan"]
    rows += [(f"{RANDOM}-{n:02d}", plan, unknown, "bits at random, within the budget") for n, plan in enumerate(drawn)]
    place = {"model": damage.model, **plans[["budget", "budget_bytes"]].iloc[0].set_axis(["budget", "budget_nbytes"])}
    told = ("arm", "plan", "confidence", "note")
    return _frame(ARMS, [place | dict(zip(told, row, strict=True)) for row in rows])


def synergies(damage: Damage, units: Units) -> pd.DataFrame:
    """SYNERGY: what every measured pair removes of worst_rel beyond the sum of its members."""
    rows = []
    for first, second in itertools.combinations(units.added, 2):
        both = units.name([first, second])
        if both in damage.nll and damage.ranked:
            four = [damage.worst(plan) for plan in (NONE, first, second, both)]
            value = synergy(*(each for each, _ in four))
            value_R = four[1][1] + four[2][1] - four[0][1] - four[3][1]
            found = damage.estimate(value, value_R)
            place = {"model": damage.model, "first": first, "second": second, "worst_rel": four[3][0]}
            rows.append(place | {"value": found.value, "lo": found.lo, "hi": found.hi, "n": damage.units})
    return _frame(SYNERGY, rows)


def protected(damage: Damage, units: Units, choice: Choice, budget: str) -> pd.DataFrame:
    """PROTECTED: every unit, what protecting it alone does, whether it was chosen and how often it would be."""
    rows, (none, none_R) = [], damage.worst(NONE)
    chosen = units.parse(choice.plan)
    for unit, added in units.added.items():
        value, value_R = damage.worst(unit)
        found = damage.estimate(none - value, none_R - value_R)
        place = {"model": damage.model, "budget": budget, "unit": unit, "nbytes": added, "chosen": unit in chosen}
        place["frequency"] = choice.frequency[unit]
        rows.append(place | {"value": found.value, "lo": found.lo, "hi": found.hi, "n": damage.units})
    return _frame(PROTECTED, rows)


def fairness(
    sentences: pd.DataFrame,
    sets: pd.DataFrame,
    arms: pd.DataFrame,
    answers: pd.DataFrame | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """FAIRNESS: every arm on the report split, by language and over languages, and against the fair one.

    `answers`: plan, language, item, acc of multiple-choice items that each plan was asked, where there are some.
    """
    damage, nbytes = Damage(sentences, "report", resamples=resamples, seed=seed), sets.set_index("plan")["nbytes"]
    of = arms.set_index("arm")["plan"]
    fair = of.get(FAIR, NONE)  # none: all floored, and nothing is ranked
    base = next((arm for arm in (NONE, ALLOCATOR) if arm in of), None)  # what English is held against
    rows: list[Row] = []
    for arm, plan in [(REFERENCE, REFERENCE), *arms[["arm", "plan"]].itertuples(index=False, name=None)]:
        place = {"arm": arm, "plan": plan, "nbytes": float(nbytes.get(plan, math.nan))}
        found = damage.rows(plan)
        if damage.ranked and plan != REFERENCE:
            value, value_R = (each - other for each, other in zip(damage.worst(plan), damage.worst(fair), strict=True))
            found.append(damage._row(ALL, "worst_rel_over_fair", value, value_R))
            if ENGLISH in damage.languages and base:
                own = damage.excess(plan, base=of[base])
                ends = {"value": own.value, "lo": own.lo, "hi": own.hi, "n": damage.units, "status": "ok"}
                found.append({"split": "report", "language": ENGLISH, "metric": f"excess_over_{base}", **ends})
        if answers is not None and len(answers):
            found += _accuracy(answers, plan, damage, resamples=resamples, seed=seed)
        rows += [place | row for row in found]
    rows += _random(damage, arms, fair)
    place = {"model": damage.model, "budget": arms["budget"].iloc[0]}
    return _frame(FAIRNESS, [place | row for row in rows])


def _random(damage: Damage, arms: pd.DataFrame, fair: str) -> list[Row]:
    """The mean over the seeds of random protection, what protecting anything at all brings, and all arms against it."""
    drawn = arms["arm"].str.startswith(f"{RANDOM}-")
    plans = arms.loc[drawn, "plan"].tolist()
    if not plans or not damage.ranked:
        return []
    worst = [damage.worst(plan) for plan in plans]
    value, value_R = float(np.mean([each for each, _ in worst])), np.mean([each_R for _, each_R in worst], axis=0)
    own, own_R = damage.worst(fair)
    found = [
        damage._row(ALL, "worst_rel", value, value_R),
        damage._row(ALL, "worst_rel_over_fair", value - own, value_R - own_R),
    ]
    note = f"mean of {len(plans)} seeds, {len(set(plans))} different sets"
    rows = [{"arm": RANDOM, "plan": "", "nbytes": math.nan, **row, "status": note} for row in found]
    for arm, plan in arms.loc[~drawn, ["arm", "plan"]].itertuples(index=False, name=None):
        own, own_R = damage.worst(plan)
        row = damage._row(ALL, "random_over_this", value - own, value_R - own_R)
        rows.append({"arm": arm, "plan": plan, "nbytes": math.nan, **row})
    return rows


def _accuracy(answers: pd.DataFrame, plan: str, damage: Damage, *, resamples: int, seed: int) -> list[Row]:
    """Accuracy of multiple-choice items by language (Wilson), and what it lost against the reference, item by item."""
    rows = []
    for language in damage.languages:
        own = answers[answers["language"] == language].pivot(index="item", columns="plan", values="acc")
        if plan not in own or own.empty:
            continue
        share, n = float(own[plan].mean()), len(own)
        lost_I = (own[plan] - own[REFERENCE]).to_numpy()
        counts_RI = resample(np.arange(n), resamples, np.random.default_rng([seed, 7])).astype(float)
        lost = mean_interval(float(lost_I.mean()), counts_RI @ lost_I / n, n, PSEUDO_ITEMS / n**2)
        ends = (("acc", share, *share_interval(share, 0.0, n)), ("delta_acc", lost.value, lost.lo, lost.hi))
        for metric, value, lo, hi in ends:
            place = {"split": "items", "language": language, "metric": metric}
            rows.append(place | {"value": value, "lo": lo, "hi": hi, "n": n, "status": "ok"})
    return rows


def conditions(sets: pd.DataFrame, arms: pd.DataFrame) -> str:
    """What was rounded, what was protected, and within how many bytes, in one line."""
    first, budget = sets.iloc[0], arms.iloc[0]
    return (
        f"{first['model']}: {first['low']}, one scale a row; protected units {first['high']}; "
        f"budget {budget['budget']} = {int(budget['budget_nbytes']):,} bytes"
    )


def _frame(table: Any, rows: Sequence[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=table.names)


def read_sets(model: str, plans: Iterable[str], units: Units, *, low: str, high: str) -> pd.DataFrame:
    """SETS: the plans that were read, and their bytes."""
    rows = []
    for plan in plans:
        each = units.parse(plan)
        nbytes = units.nbytes(each)
        place = {"model": model, "plan": plan, "size": len(each), "low": low, "high": high, "nbytes": nbytes}
        rows.append(place | {"matrices_nbytes": nbytes - units.rest, "weights": units.weights})
    return _frame(SETS, rows)
