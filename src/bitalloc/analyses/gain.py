"""What an optimised plan gains over uniform at equal bytes, and loses to the reference."""

from __future__ import annotations

import numpy as np

from bitalloc.analyses.study import BEST, REFERENCE, UNIFORM, Sample, Study
from bitalloc.statistics import Estimate, equivalence_p, mcnemar_p, two_sided_p


def gain(study: Study) -> None:
    """Every named strategy against uniform at equal bytes, and against the reference.

    The declared tests, here and nowhere else: best against uniform in every task at every budget. Their exact
    McNemar p-values carry Holm's correction; those of other strategies Benjamini and Hochberg's. Where whole clusters
    are drawn (subjects), `clustered_p`, from the interval of the difference, takes the test's place. `equivalence_p`
    (two one-sided tests, margin of the configuration) must be small before "no loss" may be said of best.
    """
    named = study.named
    uniform = study.plan_of(UNIFORM)
    for plan, strategy, budget in zip(named["plan"], named["strategy"], named["budget"], strict=True):
        other = uniform.get(budget) if strategy != UNIFORM else None
        place = {"proxy": strategy, "budget": str(budget)}
        for corpus in study.nll:
            sample = study.sample(f"nll:{corpus}", named["plan"].tolist())
            _perplexity(study, sample, plan, other, gold=f"ppl:{corpus}", **place)
        for gold in study.golds:
            sample = study.sample(gold, named["plan"].tolist())
            _accuracy(study, sample, plan, other, gold=gold, **place)


def _perplexity(study: Study, nll: Sample, plan: str, uniform: str | None, **place: str) -> None:
    """100 (1 - PPL / PPL_uniform) percent and nats above the reference, paired over windows."""
    if REFERENCE in nll.scores.plans:
        above = nll.difference(plan, REFERENCE)
        study.add_estimate("gain", "nats_above_reference", above, n=nll.n, **place)
    if uniform is not None:
        nats = nll.difference(plan, uniform)
        value, hi, lo = (float(-100 * np.expm1(each)) for each in (nats.value, nats.lo, nats.hi))
        study.add("gain", "ppl_gain_percent", value, lo=lo, hi=hi, n=nll.n, **place)


def _accuracy(study: Study, task: Sample, plan: str, uniform: str | None, **place: str) -> None:
    """Points against uniform and against the reference, paired over items."""
    place = {**place, "n": task.n}
    binary = place["gold"] in study.tasks
    if uniform is not None:
        found = task.difference(plan, uniform)
        study.add_estimate("gain", "accuracy_points", found, 100.0, **place)
        if binary:
            a_I, b_I = task.scores.of([plan, uniform])
            p = float(mcnemar_p(int((a_I > b_I).sum()), int((a_I < b_I).sum())))
            family = "declared gains" if place["proxy"] == BEST else "gains"
            clustered = (
                task.units < task.n
            )  # items of a subject are not independent, as McNemar's test takes them to be
            study.add("gain", "mcnemar_p", p, p=np.nan if clustered else p, family=family, **place)
            if clustered:
                p = two_sided_p(found.value, found.deviation, found.df)
                study.add("gain", "clustered_p", p, p=p, family=family, **place)
            _equivalence(study, "equivalence_p", found, **place)
    if REFERENCE in task.scores.plans:
        found = task.difference(plan, REFERENCE)
        study.add_estimate("gain", "accuracy_points_vs_reference", found, 100.0, **place)
        if binary:
            _equivalence(study, "equivalence_p_vs_reference", found, **place)


def _equivalence(study: Study, statistic: str, found: Estimate, **place: object) -> None:
    """Of best, a declared test; there are as many as golds and budgets, and each is a claim of its own."""
    if place["proxy"] == BEST:
        p = equivalence_p(100 * found.value, 100 * found.deviation, found.df, study.settings.margin)
        study.add("gain", statistic, p, p=p, family=f"declared {statistic}", **place)
