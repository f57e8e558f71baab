import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, false_discovery_control, kendalltau, spearmanr

from bitalloc.statistics import (
    benjamini_hochberg,
    best_of,
    cross_fitted_regret,
    equivalence_p,
    fisher_interval,
    holm,
    kendall,
    mcnemar_p,
    mean_interval,
    naive_regret,
    overoptimisation_rows,
    pressure,
    resample,
    spearman,
    split_items,
    units_drawn,
    winners_curse,
)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert float(mcnemar_p(a, b)) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1.0, len(p) * min(p)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_spearman_equals_scipy_with_ties(pairs):
    x, y = np.array(pairs, dtype=float).T
    rho = spearman(x[None], y[None])[0]
    if np.ptp(x) and np.ptp(y):
        assert rho == pytest.approx(spearmanr(x, y).statistic)
    else:
        assert np.isnan(rho)


def test_resamples_keep_their_size_and_whole_clusters():
    rng = np.random.default_rng(0)
    few, many = np.repeat(range(4), 25), np.repeat(range(20), 5)
    counts = resample(few, 50, rng)
    assert units_drawn(few) == 100
    assert (counts.reshape(50, 4, 25).sum(2) == 25).all()  # strata keep their size
    counts = resample(many, 50, rng, np.uint8)
    assert units_drawn(many) == 20 and counts.dtype == np.uint8
    counts = counts.reshape(50, 20, 5)
    assert (counts == counts[:, :, :1]).all() and (counts[:, :, 0].sum(1) == 20).all()


def test_halves_are_balanced_in_few_clusters_and_keep_many_whole():
    half = split_items(np.repeat(range(3), 11), 20, np.random.default_rng(0)).reshape(20, 3, 11)
    assert set(half.sum(2).ravel()) <= {5, 6}
    many = split_items(np.repeat(range(20), 5), 20, np.random.default_rng(0)).reshape(20, 20, 5)
    assert (many == many[:, :, :1]).all() and set(many[:, :, 0].sum(1)) == {10}


def test_naive_regret_is_biased_where_the_cross_fitted_is_not():
    """60 plans of equal accuracy, the pick independent of the gold: the truth is 0."""
    naive, crossed = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = rng.random(164) < 0.45
        gold = np.where(rng.random((60, 164)) < np.where(base, 0.111, 0.0909), ~base, base).astype(float)
        pick = np.eye(60)[rng.integers(60)]
        half = split_items(np.zeros(164), 5, rng)
        naive.append(naive_regret(gold, pick))
        crossed.append(cross_fitted_regret(gold, pick, half).mean())
    assert np.mean(naive) > 4
    assert abs(np.mean(crossed)) < 1


def test_fisher_interval_holds_the_estimate_and_stays_inside():
    rho_R = np.clip(np.random.default_rng(0).normal(-0.85, 0.05, 500), -1, 1)
    lo, hi = fisher_interval(-0.9, rho_R, np.zeros(500), rho_R, 40)
    assert -1 < lo < -0.9 < hi < 0
    assert np.isnan(fisher_interval(np.nan, rho_R, rho_R, rho_R, 40)).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_benjamini_hochberg_equals_scipy(p):
    assert benjamini_hochberg(p) == pytest.approx(false_discovery_control(p))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_kendall_equals_scipy_with_ties(pairs):
    x, y = np.array(pairs, dtype=float).T
    tau = kendall(x[None], y[None])[0]
    if np.ptp(x) and np.ptp(y):
        assert tau == pytest.approx(kendalltau(x, y).statistic, abs=1e-5)
    else:
        assert np.isnan(tau)


def test_best_of_is_the_mean_over_all_subsets():
    gold = np.random.default_rng(0).normal(size=7)  # in the proxy's order
    for n in range(1, 8):
        drawn = [min(np.random.default_rng(seed).choice(7, n, replace=False)) for seed in range(4000)]
        assert best_of(7)[n - 1] @ gold == pytest.approx(gold[drawn].mean(), abs=0.06)
    assert best_of(7).sum(1) == pytest.approx(1) and best_of(7)[-1].tolist() == [1, *[0] * 6]


def test_a_planted_curve_of_overoptimisation_is_recovered():
    alpha, beta = overoptimisation_rows(60)
    d = pressure(np.arange(1, 61))
    # the gold that gives the curve gain = d (4 - 1.5 d) exactly: solve the triangular system of the means over subsets
    gold = np.linalg.solve(best_of(60)[::-1], (d * (4 - 1.5 * d))[::-1])
    assert alpha @ gold == pytest.approx(4, abs=0.01) and beta @ gold == pytest.approx(1.5, abs=0.01)
    assert beta @ -np.random.default_rng(0).normal(size=(60, 4000)).cumsum(0).mean(1) == pytest.approx(0, abs=3)


def test_equal_plans_claim_a_gain_and_keep_none():
    claimed, kept = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = winners_curse(rng.normal(0, 1, (30, 24)), split_items(np.zeros(24), 4, rng))
        claimed.append(found[0])
        kept.append(found[1])
    assert np.mean(claimed) > 0.4 and abs(np.mean(kept)) < 0.05


def test_an_interval_of_few_units_is_students_and_never_empty():
    value_R = np.random.default_rng(0).normal(0, np.sqrt(23 / 24), 20_000)
    found = mean_interval(1.0, value_R, 24)
    assert (found.hi - found.lo) / 2 == pytest.approx(2.069, rel=0.02) and found.df == 23
    assert mean_interval(0.0, np.zeros(9), 50, extra=2 / 50**2).hi == pytest.approx(0.0568, rel=0.01)


def test_equivalence_is_shown_only_inside_the_margin():
    assert equivalence_p(0.0, 0.3, 100, 1.0) < 0.001 < equivalence_p(0.0, 0.8, 100, 1.0)
    assert equivalence_p(1.0, 0.001, 100, 1.0) == pytest.approx(0.5) and equivalence_p(-2.0, 0.1, 100, 1.0) > 0.99
