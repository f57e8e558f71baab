"""What is claimed of languages, and what came of it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from bitalloc.fairness.arms import ALLOCATOR, ENGLISH_ONLY, PATTERN, RANDOM
from bitalloc.fairness.damage import Row
from bitalloc.statistics import Estimate
from bitalloc.statistics.ranks import spearman
from bitalloc.statistics.verdicts import NOT_RUN, above, below
from bitalloc.tables import CRITERIA

MARGIN = 0.001  # nats a token: a thousandth of PPL, within which real codes count as the simulated ones


def criteria(table: pd.DataFrame, backends: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """CRITERIA of one model, from FAIRNESS of all budgets and BACKENDS of sets in packed codes.

    Does the published pattern spare the worst-off more than random sets of its bytes do; does the fair set or plan more
    than the other arms; do packed codes lose what was simulated; does low damage mean that accuracy is kept? The last
    is Spearman's rho, over arms and languages, of relative damage against accuracy lost: resampled by arm.
    """
    model, rows = table["model"].iloc[0], []
    over = table[table["metric"].isin(["worst_rel_over_fair", "random_over_this"])].set_index(
        ["budget", "arm", "metric"]
    )
    over = over[~over.index.duplicated()]
    for budget in dict.fromkeys(table["budget"]):
        asked = [("pattern beats random sets", (PATTERN, "random_over_this"))]
        asked += [
            (f"fair beats {arm}", (arm, "worst_rel_over_fair")) for arm in (ALLOCATOR, ENGLISH_ONLY, PATTERN, RANDOM)
        ]
        for criterion, (arm, metric) in asked:
            if (budget, arm, metric) not in over.index:
                continue
            row = over.loc[(budget, arm, metric)]
            found = Estimate(row["value"], row["lo"], row["hi"], math.nan, math.nan)
            place = {"criterion": f"{criterion}, {budget}", "corpus": "all", "metric": "worst_rel", "n": row["n"]}
            why = "difference of the worst relative damage"
            rows.append(place | _interval(found) | {"comparison": "> 0", "verdict": above(found, 0.0), "why": why})
    for row in backends[backends["status"] == "measured"].itertuples():
        found = Estimate(row.loss_nats_per_token, row.loss_lo, row.loss_hi, math.nan, math.nan)
        place = {"criterion": f"packed codes lose nothing, {row.plan}", "corpus": row.task.partition("/")[0]}
        told = {
            "comparison": f"< {MARGIN:g}",
            "verdict": below(found, MARGIN),
            "why": f"above simulated, {row.backend}",
        }
        rows.append(place | {"metric": "nll_nats_per_token", "n": 0} | _interval(found) | told)
    rows.append(_tells_accuracy(table, seed=seed, resamples=resamples))
    rows = [{"model": model, **row} for row in rows]
    return pd.DataFrame(rows, columns=CRITERIA.names)


def _tells_accuracy(table: pd.DataFrame, *, seed: int, resamples: int) -> Row:
    place: Row = {"criterion": "damage tells lost accuracy", "corpus": "all", "metric": "spearman"}
    wide = table[table["metric"].isin(["damage_rel", "delta_acc"])]
    wide = wide.pivot_table(index=["budget", "arm", "language"], columns="metric", values="value")
    if "delta_acc" not in wide or len(wide := wide.dropna()) < 8:
        nothing = {"value": math.nan, "lo": math.nan, "hi": math.nan, "n": 0, "comparison": "", "verdict": NOT_RUN}
        return place | nothing | {"why": "no multiple-choice items in these languages"}
    arm_I = wide.reset_index("language").index.factorize()[0]
    pair_2I = wide["damage_rel"].to_numpy(), -wide["delta_acc"].to_numpy()
    value = float(spearman(*(each_I[None] for each_I in pair_2I))[0])
    rng, value_R = np.random.default_rng([seed, 11]), np.zeros(resamples)
    of_A = [np.flatnonzero(arm_I == arm) for arm in range(arm_I.max() + 1)]
    for r in range(resamples):
        drawn_I = np.concatenate([of_A[a] for a in rng.integers(len(of_A), size=len(of_A))])
        value_R[r] = spearman(*(each_I[drawn_I][None] for each_I in pair_2I))[0]
    lo, hi = np.nanquantile(value_R, [0.025, 0.975])
    found = Estimate(value, float(lo), float(hi), math.nan, math.nan)
    told = {"comparison": "> 0", "verdict": above(found, 0.0), "why": f"{len(of_A)} arms x languages; 1 would tell all"}
    return place | {"n": len(wide)} | _interval(found) | told


def _interval(found: Estimate) -> Row:
    return {"value": found.value, "lo": found.lo, "hi": found.hi}
