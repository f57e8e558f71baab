"""Pairs of plans in which perplexity and a task contradict each other."""

from __future__ import annotations

import itertools

import numpy as np

from bitalloc.analyses.power import only
from bitalloc.analyses.study import Study
from bitalloc.statistics import mcnemar_p, resample

ALPHA = 0.05
BETTER_PPL = 0.01  # share by which one plan's PPL must be below another's to call it better


def divergence(study: Study) -> None:
    """Pairs of one budget whose first plan is better by more than 1 % of PPL: is its accuracy significantly
    worse (exact McNemar, 5 %)? Were there no difference, half of the 5 % would say so at most.
    """
    nll = study.pooled[study.perplexity]
    for gold, (budget, names) in itertools.product(study.tasks, study.strata.items()):
        place = {"proxy": study.perplexity, "gold": gold, "budget": budget, "n": len(names)}
        nll_P, only_PP = nll.means(names), only(study.pooled[gold], names)
        better_PP = -np.expm1(nll_P[:, None] - nll_P) > BETTER_PPL
        worse_PP = better_PP & (only_PP < only_PP.T) & (mcnemar_p(only_PP, only_PP.T) < ALPHA)
        pairs, divergent = float(better_PP.sum()), float(worse_PP.sum())
        study.add("divergence", "pairs", pairs, **place)
        study.add("divergence", "divergent_pairs", divergent, **place)
        study.add("divergence", "expected_by_chance", ALPHA / 2 * pairs, **place)
        if pairs:
            counts_RP = resample(np.zeros(len(names)), study.settings.resamples, study.rng(f"pairs {budget}"))
            all_R, worse_R = ((counts_RP @ each * counts_RP).sum(1) for each in (better_PP, worse_PP))
            lo, hi = np.quantile(worse_R[all_R > 0] / all_R[all_R > 0], [ALPHA / 2, 1 - ALPHA / 2])
            study.add("divergence", "divergent_share", divergent / pairs, lo=float(lo), hi=float(hi), **place)
