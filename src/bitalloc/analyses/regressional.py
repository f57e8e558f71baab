"""Regressional Goodhart: how much of a claimed gain belongs to the windows that chose the plan."""

from __future__ import annotations

import numpy as np

from bitalloc.analyses.study import ALL, Sample, Study
from bitalloc.statistics import jackknife, winners_curse

BLOCKS = 30  # of the jackknife, at most


def regressional(study: Study) -> None:
    """Gain in nats of the plan chosen on half of the windows over the mean plan: claimed there, kept on the others.

    `shrinkage_nats` is what is lost on the way. A choice by all windows loses about half as much. Windows are left out
    in turns, plans stay.
    """
    for name in (name for name in study.proxies if name.startswith("nll:")):
        sample = study.pooled[name]
        half_FI, block_I = study.halves(name, sample), _blocks(sample)
        strata = {budget: plans for budget, plans in study.strata.items() if len(plans) > 1}
        if not strata or block_I.max() < 3:
            continue
        kept = [np.ones(sample.n, bool), *(block_I != block for block in range(block_I.max() + 1))]
        found = {
            budget: np.array([_gains(sample.scores.of(plans)[:, own], half_FI[:, own]) for own in kept])
            for budget, plans in strata.items()
        }
        for budget, values in {**found, ALL: np.mean(list(found.values()), axis=0)}.items():
            for statistic, (value, *without) in zip(
                ("claimed_nats", "kept_nats", "shrinkage_nats"), values.T, strict=True
            ):
                place = {"gold": f"ppl:{name.removeprefix('nll:')}", "budget": budget, "n": sample.n}
                study.add_estimate("regressional", statistic, jackknife(value, np.array(without)), proxy=name, **place)


def _gains(loss_PI: np.ndarray, half_FI: np.ndarray) -> tuple[float, float, float]:
    claimed, kept = winners_curse(loss_PI, half_FI)
    return claimed, kept, claimed - kept


def _blocks(sample: Sample) -> np.ndarray:
    """The block of each window: whole clusters, at most so many blocks."""
    code_I = (
        np.unique(sample.scores.group_I, return_inverse=True)[1] if sample.units < sample.n else np.arange(sample.n)
    )
    return code_I % min(BLOCKS, code_I.max() + 1)
