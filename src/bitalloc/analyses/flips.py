"""Answers that change while accuracy stands still (Dutta et al. 2024, arXiv 2407.09141)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bitalloc.analyses.study import ALL, REFERENCE, RERUN, Sample, Study
from bitalloc.statistics import share_interval


def flips(study: Study) -> None:
    """Percent of the items that go from right to wrong, from wrong to right, and stay wrong, against the reference.

    The same of `reference-rerun`, the reference evaluated a second time with another batch size, is the floor: what
    changes without any quantisation. Missing where there is no rerun. That an answer is wrong twice says nothing about
    whether it is the same one: responses tell right from wrong alone.
    """
    plans = [*study.named[["plan", "strategy", "budget"]].itertuples(index=False, name=None), (RERUN, RERUN, ALL)]
    for gold in study.tasks:
        asked = study.sets[gold].plans
        if REFERENCE not in asked:
            continue
        for plan, strategy, budget in plans:
            place = {"proxy": strategy, "gold": gold, "budget": str(budget)}
            if plan in asked:
                names = [RERUN] if plan == RERUN else study.named["plan"].tolist()
                _rows(study, study.sample(gold, names), plan, place)
            else:
                study.add("flips", "flips_percent", np.nan, n=0, status="missing", **place)


def _rows(study: Study, task: Sample, plan: str, place: dict[str, str]) -> None:
    now_I, before_I = task.scores.of([plan, REFERENCE]).astype(bool)
    shares = pd.DataFrame({
        "flips_percent": now_I != before_I,
        "right_to_wrong_percent": before_I & ~now_I,
        "wrong_to_right_percent": ~before_I & now_I,
        "wrong_to_wrong_percent": ~before_I & ~now_I,
    })  # fmt: skip
    values_KI = shares.to_numpy(dtype=float).T
    # items that are drawn one by one are binomial; clusters say how far from it they are
    deviation_K = task.draw(values_KI).std(0) if task.units < task.n else np.zeros(len(values_KI))
    for statistic, values_I, deviation in zip(shares, values_KI, deviation_K, strict=True):
        value = float(np.average(values_I, weights=task.scores.weight_I))
        lo, hi = share_interval(value, float(deviation), task.n)
        study.add("flips", statistic, 100 * value, lo=100 * lo, hi=100 * hi, n=task.n, **place)
