"""What an interval says of a claim: met, not met, or open; not run where there is none."""

from __future__ import annotations

from bitalloc.statistics.intervals import Estimate

MET, NOT_MET, OPEN, NOT_RUN = "met", "not met", "open", "not run"


def above(found: Estimate, threshold: float) -> str:
    """`met` where the whole interval lies above the threshold, `not met` where none of it does.

    >>> above(Estimate(0.2, 0.1, 0.3, 0.05, 9), 0.0), above(Estimate(0.2, -0.1, 0.3, 0.1, 9), 0.0)
    ('met', 'open')
    """
    return MET if found.lo > threshold else NOT_MET if found.hi <= threshold else OPEN


def below(found: Estimate, threshold: float) -> str:
    """`met` where the whole interval lies below the threshold, `not met` where none of it does."""
    return MET if found.hi < threshold else NOT_MET if found.lo > threshold else OPEN
