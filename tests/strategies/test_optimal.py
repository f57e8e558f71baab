"""The optimum against brute force (small), against HiGHS (large), and the certificate that it comes with."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from bitalloc.option import Option
from bitalloc.strategies import Instance, strategy
from bitalloc.strategies.optimal import _relax, gap, solve

SHAPES_72B = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (29568, 8192), (29568, 8192), (8192, 29568)]


def made(nbytes_NK, costs_NK) -> Instance:
    nbytes_NK = np.array(nbytes_NK, dtype=np.int64)
    options = tuple(Option("gptq", 2, 64, rank) for rank in range(nbytes_NK.shape[1]))
    layers = tuple(f"layer{i}" for i in range(len(nbytes_NK)))
    weights_N = np.full(len(layers), 1000)
    return Instance(layers, options, weights_N, nbytes_NK, np.array(costs_NK, dtype=float))


def large(seed: int, blocks: int = 80, law=lambda bits, rank, delta: 2.0 ** (-2.2 * bits) * (1 + rank / 32) ** -delta):
    """A 72B model: 7 matrices a block, 15 options, costs over three orders of magnitude."""
    rng = np.random.default_rng(seed)
    options = [Option("gptq", bits, 128, rank) for bits in (2, 3, 4) for rank in (0, 32, 64, 128, 256)]
    shapes = SHAPES_72B * blocks
    nbytes_NK = [[option.nbytes(*shape) for option in options] for shape in shapes]
    errors_NK = [
        [law(o.bits, o.rank, delta) * rng.lognormal(0, 0.05) for o in options]
        for delta in rng.uniform(0.1, 0.9, len(shapes))
    ]
    costs_NK = rng.lognormal(0, 1.5, len(shapes))[:, None] * np.array(errors_NK)
    weights_N = np.array([rows * columns for rows, columns in shapes])
    return Instance(tuple(map(str, range(len(shapes)))), tuple(options), weights_N, np.array(nbytes_NK), costs_NK)


def referee(instance: Instance, budget: int) -> float:
    """Optimum of the mixed integer programme by HiGHS."""
    n, k = instance.costs_NK.shape
    unit, scale = instance.nbytes_NK.max(), instance.costs_NK.mean()
    one_each = LinearConstraint(kron(eye_array(n), np.ones((1, k))), 1, 1)
    within = LinearConstraint(csr_array(instance.nbytes_NK.reshape(1, -1) / unit), -np.inf, budget / unit)
    found = milp(
        instance.costs_NK.ravel() / scale,
        constraints=[one_each, within],
        integrality=np.ones(n * k),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-5, "time_limit": 30},
    )
    assert found.success
    return found.fun * scale


def brute_force(instance: Instance, budget: int) -> tuple[float, int]:
    """Least objective, and the fewest bytes at which it is had."""
    n, k = instance.costs_NK.shape
    plans = (np.array(plan) for plan in itertools.product(range(k), repeat=n))
    return min((instance.objective(plan), instance.size(plan)) for plan in plans if instance.size(plan) <= budget)


@st.composite
def small(draw) -> tuple[Instance, int]:
    """Up to 5 matrices x 4 options with whole-numbered costs, hence many ties, some options not offered."""
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    grid = st.lists(st.lists(st.integers(0, 12), min_size=k, max_size=k), min_size=n, max_size=n)
    costs_NK = np.array(draw(grid), dtype=float)
    for i, missing in enumerate(draw(st.lists(st.integers(-k, k - 1), min_size=n, max_size=n))):
        if missing > 0:
            costs_NK[i, missing] = np.inf
    instance = made(np.array(draw(grid)) + 1, costs_NK)
    return instance, draw(st.integers(instance.least, instance.most + 3))


@settings(deadline=None, max_examples=200)
@given(small())
def test_equals_brute_force_with_ties_to_fewer_bytes(case):
    instance, budget = case
    solution = solve(instance, budget)
    assert (solution.objective, instance.size(solution.choice_N)) == brute_force(instance, budget)
    assert solution.objective == instance.objective(solution.choice_N)
    assert solution.lower_bound == pytest.approx(solution.objective, rel=1e-12)


@settings(deadline=None)
@given(small(), st.integers(0, 60))
def test_bound_holds_whatever_the_effort(case, effort):
    instance, budget = case
    best, _ = brute_force(instance, budget)
    solution = solve(instance, budget, effort=effort)
    assert solution.lower_bound <= best + 1e-9 and best <= solution.objective
    assert instance.size(solution.choice_N) <= budget


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from([0, 2_000, 20_000]))
def test_bound_holds_when_states_are_lost(seed, share, effort):
    """Costs nearly proportional to bytes are what the dynamic programme finds hardest."""
    rng = np.random.default_rng(seed)
    nbytes_NK = rng.integers(1, 10**6, (20, 6))
    instance = made(nbytes_NK, (10**6 - nbytes_NK) / 10**6 + rng.uniform(0, 1e-3, nbytes_NK.shape))
    budget = int(instance.least + share * (instance.most - instance.least))
    exact, hasty = solve(instance, budget), solve(instance, budget, effort=effort)
    assert max(instance.size(exact.choice_N), instance.size(hasty.choice_N)) <= budget
    assert hasty.lower_bound <= exact.objective * (1 + 1e-12)
    assert exact.lower_bound <= exact.objective <= hasty.objective * (1 + 1e-12)


def test_states_are_lost_at_all():
    rng = np.random.default_rng(0)
    nbytes_NK = rng.integers(1, 10**6, (30, 15))
    instance = made(nbytes_NK, (10**6 - nbytes_NK) / 10**6)
    budget = (instance.least + instance.most) // 2
    solution = solve(instance, budget, effort=20_000)
    assert 0 < solution.gap < 1e-3
    assert solve(instance, budget).gap <= solution.gap


@pytest.mark.parametrize("share", [0.02, 0.1, 0.35, 0.8])
def test_560_matrices_equal_highs(share):
    instance = large(seed=1)
    assert instance.costs_NK.shape == (560, 15)
    budget = int(instance.least + share * (instance.most - instance.least))
    solution = solve(instance, budget)
    assert instance.size(solution.choice_N) <= budget
    assert solution.gap < 1e-4
    assert solution.objective == pytest.approx(referee(instance, budget), rel=1e-4)


def test_equal_matrices_and_proportional_costs_stay_exact():
    """All coefficients equal, cost linear in bytes: every plan of the same bytes is as good."""
    instance = large(seed=2)
    costs_NK = 1 - instance.nbytes_NK / instance.nbytes_NK.max()
    hard = Instance(instance.layers, instance.options, instance.weights_N, instance.nbytes_NK, costs_NK)
    budget = (hard.least + hard.most) // 2
    assert solve(hard, budget).gap < 1e-4


def test_relaxation_is_the_linear_programme():
    instance = large(seed=3, blocks=4)
    budget = int(instance.least + 0.4 * (instance.most - instance.least))
    price, base_N = _relax(instance, instance.efficient_NK, budget)
    bound = instance.objective(base_N) - price * (budget - instance.size(base_N))
    n, k = instance.costs_NK.shape
    unit = instance.nbytes_NK.max()
    relaxed = milp(
        instance.costs_NK.ravel(),
        constraints=[
            LinearConstraint(kron(eye_array(n), np.ones((1, k))), 1, 1),
            LinearConstraint(csr_array(instance.nbytes_NK.reshape(1, -1) / unit), -np.inf, budget / unit),
        ],
        bounds=Bounds(0, 1),
    )
    assert bound == pytest.approx(relaxed.fun, rel=1e-6)


def test_a_budget_that_holds_everything_takes_the_least_cost_and_no_more_bytes():
    instance = made([[1, 2, 3], [5, 6, 7]], [[3, 1, 1], [2, 1, 0]])
    solution = solve(instance, instance.most)
    assert list(solution.choice_N) == [1, 2] and solution.gap == 0


def test_two_runs_choose_the_same():
    instance = large(seed=4, blocks=10)
    budget = (instance.least + instance.most) // 2
    assert (solve(instance, budget).choice_N == solve(instance, budget).choice_N).all()


def test_bits_only_and_rank_only_are_restrictions():
    instance = large(seed=5, blocks=3)
    budget = int(instance.least + 0.4 * (instance.most - instance.least))
    bits = [instance.options[k] for k in strategy("bits_only")(instance, budget)]
    ranks = [instance.options[k] for k in strategy("rank_only")(instance, budget)]
    assert {option.rank for option in bits} == {0} and len({option.bits for option in bits}) > 1
    assert len({(option.bits, option.group_size) for option in ranks}) == 1
    assert len({option.rank for option in ranks}) > 1


def test_gap_of_a_bound_of_nought():
    assert gap(0.0, 0.0) == 0 and gap(0.5, 0.0) == np.inf
