"""The figures: frames in, one PNG out. Deterministic bytes, readable in grey, labelled directly."""

from bitalloc.figures.backends import backends
from bitalloc.figures.domains import domains
from bitalloc.figures.evolution import evolution
from bitalloc.figures.failure_modes import failure_modes
from bitalloc.figures.fairness import fairness, fairness_plans
from bitalloc.figures.goodhart import goodhart
from bitalloc.figures.law import law
from bitalloc.figures.phase import phase
from bitalloc.figures.position import position
from bitalloc.figures.profile import profile
from bitalloc.figures.runs import long_context, perplexity
from bitalloc.figures.sensitivity import errors, plan, sensitivity
from bitalloc.figures.style import stamp
from bitalloc.figures.tune import tune
