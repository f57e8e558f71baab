"""Did the proxy tell the truth? Perplexity, KL and the predicted objective against what one cares about.

Inside strata of equal bytes: rank correlations, cross-fitted selection regret, gains over uniform, pairs of
plans in which perplexity and a task contradict each other, and the power that the items had to show any of it.
"""

from bitalloc.analyze.study import analyze
from bitalloc.analyze.summary import summary

__all__ = ["analyze", "summary"]
