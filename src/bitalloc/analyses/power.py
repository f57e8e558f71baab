"""What the items and plans could show, printed before what they show."""

from __future__ import annotations

import itertools

import numpy as np

from bitalloc.analyses.study import ALL, MIN_PLANS, Sample, Study
from bitalloc.statistics import detectable_points, rho_half_width


def power(study: Study) -> None:
    """Detectable difference of two plans of a stratum, and how well a pool of this size places rho.

    The discordance q is the mean over the stratum's pairs, on the items that its plans share; n counts the items of
    the named plans, which are compared. The half-width over all budgets is that of a mean of independent rhos.
    """
    for gold, (budget, names) in itertools.product(study.tasks, study.strata.items()):
        if len(names) > 1:
            n = study.sample(gold, study.named["plan"].tolist()).n
            only_PP = only(study.pooled[gold], names)
            pairs = np.triu_indices(len(names), 1)
            q = float((only_PP + only_PP.T)[pairs].mean() / study.pooled[gold].n)
            place = {"proxy": ALL, "gold": gold, "budget": budget, "n": n}
            study.add("power", "discordant_share", q, **place)
            study.add("power", "detectable_points", detectable_points(q, n), **place)
    widths = {budget: rho_half_width(len(names)) for budget, names in study.strata.items() if len(names) >= MIN_PLANS}
    for budget, width in widths.items():
        study.add("power", "rho_half_width", width, proxy=ALL, gold=ALL, budget=budget, n=len(study.strata[budget]))
    if widths:
        whole, plans = np.sqrt(np.square(list(widths.values())).sum()) / len(widths), [*map(study.strata.get, widths)]
        n = sum(len(names or ()) for names in plans)
        study.add("power", "rho_half_width", float(whole), proxy=ALL, gold=ALL, budget=ALL, n=n)


def only(task: Sample, names: list[str]) -> np.ndarray:
    """Items that the plan of the row gets right and the plan of the column does not."""
    right_PI = task.scores.of(names)
    return right_PI @ (1 - right_PI).T
