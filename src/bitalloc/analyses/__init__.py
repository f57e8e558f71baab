"""Analyses: (study) -> rows of GOODHART. Power comes first, before any result."""

from bitalloc.analyses.causal import causal
from bitalloc.analyses.correlation import correlation
from bitalloc.analyses.divergence import divergence
from bitalloc.analyses.extremal import extremal
from bitalloc.analyses.flips import flips
from bitalloc.analyses.gain import gain
from bitalloc.analyses.leakage import leakage
from bitalloc.analyses.overoptimisation import overoptimisation
from bitalloc.analyses.power import power
from bitalloc.analyses.regressional import regressional
from bitalloc.analyses.regret import regret
from bitalloc.analyses.study import Analysis, Study

ANALYSES: dict[str, Analysis] = {
    "power": power,
    "correlation": correlation,
    "regret": regret,
    "overoptimisation": overoptimisation,
    "regressional": regressional,
    "extremal": extremal,
    "causal": causal,
    "leakage": leakage,
    "gain": gain,
    "flips": flips,
    "divergence": divergence,
}

__all__ = ["ANALYSES", "Analysis", "Study"]
