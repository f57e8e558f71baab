"""The statistics of the analysis, each with its formula, its source and a doctest.

Shapes: P plans, I items (or windows), R bootstrap resamples, F folds. Intervals are 95 %.
"""

from bitalloc.statistics.hypotheses import (
    benjamini_hochberg,
    detectable_points,
    equivalence_p,
    holm,
    mcnemar_p,
    two_sided_p,
)
from bitalloc.statistics.intervals import (
    Estimate,
    fisher_interval,
    jackknife,
    mean_interval,
    share_interval,
    two_way,
)
from bitalloc.statistics.ranks import kendall, reliability, rho_half_width, spearman, spearman_within
from bitalloc.statistics.samples import ACCURACIES, MIN_CLUSTERS, Scores, accuracies, resample, split_items, units_drawn
from bitalloc.statistics.selection import (
    best_of,
    cross_fitted_regret,
    hypervolume,
    naive_regret,
    overoptimisation_rows,
    pressure,
    winners_curse,
)
