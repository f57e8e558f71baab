"""Did the proxy tell the truth? Perplexity, KL and the predicted objective against what one cares about.

Inside strata of equal bytes. Golds are the accuracies of the tasks; where no task was run, top-1 agreement with the
reference stands in, without tests of significance. The analyses are members of `bitalloc.analyses`; what they found is
put into words by `bitalloc.findings`.
"""

from __future__ import annotations

import pandas as pd

from bitalloc.analyses import ANALYSES, Study
from bitalloc.config import Analyze
from bitalloc.findings import headline, summary


def analyze(
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    responses: pd.DataFrame,
    *,
    settings: Analyze,
    seed: int,
) -> pd.DataFrame:
    """PLANS, EVALUATE and RESPONSES -> GOODHART.

    Raises `BitallocError` when there is nothing to analyse or when responses cannot be paired.
    """
    study = Study(plans, evaluate, responses, settings, seed)
    for analysis in ANALYSES.values():
        analysis(study)
    return study.frame()


__all__ = ["analyze", "headline", "summary"]
