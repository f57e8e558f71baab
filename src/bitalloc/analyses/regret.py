"""Which proxy should one select by, and what does it cost to select by perplexity?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitalloc.analyses.study import ALL, POOL, UNIFORM, Sample, Study
from bitalloc.statistics import cross_fitted_regret, mean_interval, naive_regret, two_sided_p


def regret(study: Study) -> None:
    """Points of the gold that are lost by choosing with a proxy, at random, or uniform.

    `regret_points`: against the cross-fitted best, a lower bound. `versus_perplexity_points`: more lost than by
    perplexity; the rival cancels out, so it is the paired difference of two plans. Both are about the plans of this
    pool: items are drawn anew, plans and picks stay. Over all budgets and golds the comparisons are declared: Holm.
    """
    differences: dict[str, dict[str, _Difference]] = {}
    for gold in study.golds:
        task = study.pooled[gold]
        half_FI = study.halves(gold, task)
        regrets: dict[str, list[np.ndarray]] = {}
        lost: dict[str, list[np.ndarray]] = {}
        for budget, names in study.strata.items():
            if len(names) < 2:
                continue
            gold_PI, picks = task.scores.of(names), dict(_picks(study, names))
            by_perplexity_I = picks[study.perplexity] @ gold_PI
            for chooser, pick_P in picks.items():
                place = {"proxy": chooser, "gold": gold, "budget": budget}
                regret_I = cross_fitted_regret(gold_PI, pick_P, half_FI)
                _row(study, task, [regret_I], **place)
                study.add("regret", "naive_regret_points", naive_regret(gold_PI, pick_P), n=len(names), **place)
                regrets.setdefault(chooser, []).append(regret_I)
                lost.setdefault(chooser, []).append(100 * (by_perplexity_I - pick_P @ gold_PI))
        for chooser, parts in regrets.items():
            _row(study, task, parts, proxy=chooser, gold=gold, budget=ALL)
            if chooser != study.perplexity:
                found = _Difference(task, lost[chooser])
                differences.setdefault(chooser, {})[gold] = found
                found.row(study, chooser, gold)
    for chooser, found in differences.items():
        told = [each for gold, each in found.items() if study.status(gold, ALL) == "ok"]
        if told:
            _answer(study, chooser, told)


def _picks(study: Study, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Who chooses, and the weight that each plan gets in the choice."""
    for proxy, values in study.proxies.items():
        yield proxy, np.eye(len(names))[np.argmin(values.means(names))]
    yield POOL, np.full(len(names), 1 / len(names))
    uniform = set(study.plan_of(UNIFORM))
    at = [position for position, name in enumerate(names) if name in uniform]
    if at:
        yield UNIFORM, np.eye(len(names))[at[0]]


def _row(study: Study, task: Sample, parts: list[np.ndarray], **place: str) -> None:
    """The mean of a regret's contributions, and over strata."""
    regret_I = np.mean(parts, axis=0)
    extra = 100**2 * task.extra / len(parts)
    value_R = task.draw(regret_I[None])[:, 0]
    value = float(np.average(regret_I, weights=task.scores.weight_I))
    found = mean_interval(value, value_R, task.units, extra)
    study.add_estimate("regret", "regret_points", found, n=task.n, **place)


class _Difference:
    """Points lost by one chooser more than by another, item by item, averaged over the budgets."""

    def __init__(self, task: Sample, parts: list[np.ndarray]) -> None:
        lost_I = np.mean(parts, axis=0)
        self.task, self.value = task, float(np.average(lost_I, weights=task.scores.weight_I))
        self.value_R = task.draw(lost_I[None])[:, 0]
        # where both choose the same plan there is nothing to doubt
        self.extra = 100**2 * task.extra * sum(part.any() for part in parts) / len(parts) ** 2

    def row(self, study: Study, chooser: str, gold: str) -> None:
        found = mean_interval(self.value, self.value_R, self.task.units, self.extra)
        p = two_sided_p(found.value, found.deviation, found.df)
        place = {"proxy": chooser, "gold": gold, "budget": ALL, "n": self.task.n}
        study.add_estimate("regret", "versus_perplexity_points", found, p=p, family="regret", **place)


def _answer(study: Study, chooser: str, golds: list[_Difference]) -> None:
    """The mean over the golds that can tell plans apart; their items are drawn independently."""
    value = float(np.mean([each.value for each in golds]))
    variance = sum(np.var(each.value_R) * each.task.units / (each.task.units - 1) + each.extra for each in golds)
    value_R = np.array([-1.0, 1.0]) * np.sqrt(variance) / len(golds)
    units = sum(each.task.units for each in golds)
    found = mean_interval(value, value_R, units)
    p = two_sided_p(found.value, found.deviation, found.df)
    place = {"proxy": chooser, "gold": ALL, "budget": ALL, "n": sum(each.task.n for each in golds)}
    study.add_estimate("regret", "versus_perplexity_points", found, p=p, family="declared choosers", **place)
