"""The fairest plan against brute force (small), its certificate with hundreds of matrices, and what it refuses."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc.errors import BitallocError
from bitalloc.strategies.fair import fair
from bitalloc.strategies.optimal import solve
from tests.strategies.test_optimal import made


def damages(instance, damage_LNK, choice_N):
    return damage_LNK[:, np.arange(len(choice_N)), choice_N].sum(axis=1)


@st.composite
def small(draw):
    """Up to 5 matrices x 4 options x 4 languages, a budget within reach, and a limit that some plan keeps."""
    n, k, languages = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    instance = made(rng.integers(1, 30, (n, k)), rng.uniform(0, 1, (n, k)))
    damage_LNK = rng.uniform(0, 1, (languages, n, k))
    budget = draw(st.integers(instance.least, instance.most))
    least = solve(dataclasses.replace(instance, costs_NK=damage_LNK[0]), budget).objective
    return instance, damage_LNK, budget, least * draw(st.floats(1.0, 1.6)) + 1e-12


@settings(deadline=None, max_examples=60)
@given(small())
def test_is_certified_by_brute_force(case):
    instance, damage_LNK, budget, limit = case
    found = fair(instance, damage_LNK, budget, limited=0, limit=limit)
    every = [
        np.array(plan) for plan in itertools.product(*map(range, [instance.costs_NK.shape[1]] * len(instance.layers)))
    ]
    within = [damages(instance, damage_LNK, plan) for plan in every if instance.size(plan) <= budget]
    best = min(d_L.max() for d_L in within if d_L[0] <= limit)
    own_L = damages(instance, damage_LNK, found.choice_N)
    assert instance.size(found.choice_N) <= budget and own_L[0] <= limit
    assert found.lower_bound <= best * (1 + 1e-9) <= found.objective * (1 + 2e-9)
    assert found.objective == pytest.approx(own_L.max(), rel=1e-12)


def large(languages, n=560, k=15):
    """Damages that fall with bytes, and differ between languages by a factor of its own for each matrix."""
    rng = np.random.default_rng(0)
    bits_K = np.linspace(2, 4, k)
    share_LN = np.exp(rng.normal(0, 1.5, n) + rng.normal(0, 0.5, (languages, n)))
    nbytes_NK = (bits_K * 10_000).astype(int) + rng.integers(0, 99, (n, k))
    damage_LNK = share_LN[:, :, None] * 4.0**-bits_K
    return made(nbytes_NK, damage_LNK.mean(axis=0)), damage_LNK


def test_is_nearly_optimal_with_hundreds_of_matrices_and_fairer_than_the_mean():
    instance, damage_LNK = large(languages=4)
    budget = (2 * instance.least + instance.most) // 3
    found = fair(instance, damage_LNK, budget)
    assert found.gap < 1e-3
    mean = solve(instance, budget).choice_N
    assert found.objective < damages(instance, damage_LNK, mean).max() * 0.99


def test_one_language_is_the_ordinary_optimum():
    instance, damage_LNK = large(languages=1, n=60)
    budget = (instance.least + instance.most) // 2
    found, known = fair(instance, damage_LNK, budget), solve(instance, budget)
    assert found.objective == pytest.approx(known.objective, rel=1e-9)


def test_two_calls_return_the_same_plan():
    instance, damage_LNK = large(languages=4, n=40)
    budget = (instance.least + instance.most) // 2
    once, again = (fair(instance, damage_LNK, budget) for _ in range(2))
    assert (once.choice_N == again.choice_N).all()


def test_a_limit_that_no_plan_keeps_is_refused():
    instance, damage_LNK = large(languages=2, n=20)
    with pytest.raises(BitallocError, match="raise the budget or the margin"):
        fair(instance, damage_LNK, instance.least, limited=1, limit=0.0)
    with pytest.raises(BitallocError, match="below the least possible"):
        fair(instance, damage_LNK, instance.least - 1)


def test_damage_that_is_not_a_number_is_refused():
    instance, damage_LNK = large(languages=2, n=3)
    damage_LNK[1, 2, 0] = np.nan
    with pytest.raises(BitallocError, match="not finite"):
        fair(instance, damage_LNK, instance.most)
