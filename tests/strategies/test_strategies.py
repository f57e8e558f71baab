"""What every strategy promises, and what each of the simple ones does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc.errors import BitallocError
from bitalloc.option import Option
from bitalloc.strategies import STRATEGIES, Instance, strategy

SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (384, 128), (384, 128), (128, 384)]
OPTIONS = [
    Option("gptq", bits, group_size, rank) for group_size in (32, 64) for bits in (2, 3, 4) for rank in (0, 2, 4, 8)
]


def model(seed: int = 0, blocks: int = 4, options: list[Option] = OPTIONS) -> Instance:
    rng = np.random.default_rng(seed)
    shapes = SHAPES * blocks
    nbytes_NK = np.array([[option.nbytes(*shape) for option in options] for shape in shapes])
    coefficient_N = rng.lognormal(0, 1.5, len(shapes))
    error_NK = np.array(
        [[2.0 ** (-2 * o.bits) * (o.group_size / 64) ** 0.3 * (1 + o.rank) ** -0.3 for o in options]] * len(shapes)
    ) * rng.lognormal(0, 0.05, nbytes_NK.shape)
    weights_N = np.array([rows * columns for rows, columns in shapes])
    layers = tuple(f"{i}" for i in range(len(shapes)))
    return Instance(layers, tuple(options), weights_N, nbytes_NK, coefficient_N[:, None] * error_NK)


def between(instance: Instance, share: float) -> int:
    return int(instance.least + share * (instance.most - instance.least))


@pytest.mark.parametrize("name", STRATEGIES)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), blocks=st.integers(1, 3))
def test_never_over_the_budget_and_repeatable(name, seed, share, blocks):
    instance = model(seed, blocks)
    budget = between(instance, share)
    choice_N = strategy(name)(instance, budget, seed=seed)
    assert choice_N.shape == (len(instance.layers),)
    assert instance.size(choice_N) <= budget
    assert np.isfinite(instance.objective(choice_N))
    assert (choice_N == strategy(name)(instance, budget, seed=seed)).all()


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_option_that_a_matrix_does_not_offer_is_not_taken(name):
    instance = model(1)
    costs_NK = instance.costs_NK.copy()
    costs_NK[1, [o.rank == 8 for o in OPTIONS]] = np.inf
    ragged = Instance(instance.layers, instance.options, instance.weights_N, instance.nbytes_NK, costs_NK)
    for share in (0, 0.3, 0.9, 1):
        choice_N = strategy(name)(ragged, between(ragged, share), seed=0)
        assert ragged.options[choice_N[1]].rank < 8
        assert ragged.size(choice_N) <= between(ragged, share)


@pytest.mark.parametrize("name", STRATEGIES)
def test_infeasible_budget_names_the_reachable_range(name):
    instance = model()
    with pytest.raises(BitallocError, match=rf"reachable: {instance.least:,} to [\d,]+ bytes") as error:
        strategy(name)(instance, instance.least - 1, seed=0)
    assert "\n" not in str(error.value)


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(BitallocError, match="did you mean 'greedy'"):
        strategy("greddy")


def test_smallest_budget_leaves_one_plan():
    instance = model(2)
    for name in STRATEGIES:
        assert instance.size(strategy(name)(instance, instance.least, seed=3)) == instance.least


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_optimum_is_below_all_others_and_others_are_no_straw_men(share):
    instance = model(3)
    budget = between(instance, share)
    objective = {name: instance.objective(run(instance, budget, seed=0)) for name, run in STRATEGIES.items()}
    assert objective["optimal"] == min(objective.values())
    assert objective["greedy"] <= 1.05 * objective["optimal"]
    assert objective["optimal"] < objective["manual"] < objective["random"]
    assert objective["optimal"] < min(objective[name] for name in ("bits_only", "rank_only", "uniform"))


def test_uniform_is_the_best_option_that_fits():
    instance = model(4)
    budget = between(instance, 0.5)
    choice_N = strategy("uniform")(instance, budget)
    assert len(set(choice_N)) == 1
    fitting = [k for k in range(len(OPTIONS)) if instance.nbytes_NK[:, k].sum() <= budget]
    assert instance.objective(choice_N) == min(instance.costs_NK[:, k].sum() for k in fitting)


def test_uniform_refuses_when_only_mixed_plans_fit():
    options = (Option("gptq", 2, 64, 0), Option("gptq", 3, 64, 0))
    costs_NK = np.array([[1.0, np.inf], [1.0, 0.5]])
    instance = Instance(("a", "b"), options, np.array([4, 4]), np.array([[5, 9], [5, 3]]), costs_NK)
    with pytest.raises(BitallocError, match="no option that every matrix offers"):
        strategy("uniform")(instance, 8)
    assert list(strategy("optimal")(instance, 8)) == [0, 1]


def test_manual_gives_the_sensitive_ones_more():
    instance = model(5, options=[o for o in OPTIONS if o.bits < 4 and o.group_size == 64])
    budget = between(instance, 0.4)
    choice_N = strategy("manual")(instance, budget)
    levels = {(instance.options[k].bits, instance.options[k].rank) for k in choice_N}
    assert levels == {(2, 0), (3, 8)}
    upgraded_N = choice_N == choice_N.max()
    low_N = instance.costs_NK[:, 0] / instance.weights_N
    assert np.median(low_N[upgraded_N]) > np.median(low_N[~upgraded_N])
    step_N = instance.nbytes_NK.max(axis=1) - instance.nbytes_NK.min(axis=1)
    assert budget - instance.size(choice_N) < step_N[~upgraded_N].min()


def test_manual_moves_to_wider_codes_with_the_budget():
    instance = model(5)
    bits = {instance.options[k].bits for k in strategy("manual")(instance, between(instance, 0.7))}
    assert bits == {3, 4}


def test_greedy_leaves_nothing_that_still_fits():
    instance = model(6)
    budget = between(instance, 0.37)
    choice_N = strategy("greedy")(instance, budget)
    free = budget - instance.size(choice_N)
    saves_NK = instance.costs_NK < instance.at(instance.costs_NK, choice_N)[:, None]
    added_NK = instance.nbytes_NK - instance.at(instance.nbytes_NK, choice_N)[:, None]
    assert not (saves_NK & (added_NK <= free)).any()


@pytest.mark.parametrize("blocks", [1, 4, 80])
def test_random_plans_fill_the_window_and_differ(blocks):
    instance = model(7, blocks)
    budget = between(instance, 0.35)
    plans = [STRATEGIES["random"](instance, budget, seed=seed) for seed in range(12)]
    sizes = np.array([instance.size(choice_N) for choice_N in plans])
    assert (sizes <= budget).all() and (sizes >= 0.99 * budget).all()
    assert len({choice_N.tobytes() for choice_N in plans}) == 12
    objectives = [instance.objective(choice_N) for choice_N in plans]
    assert max(objectives) > 1.1 * min(objectives)  # spread does not vanish with the number of matrices


def test_a_cost_that_is_no_number_is_refused():
    for bad in (np.nan, -1.0):
        with pytest.raises(BitallocError, match=r"second at gptq-2b-g64-r0 costs"):
            Instance(
                ("first", "second"), (Option("gptq", 2, 64, 0),), np.ones(2), np.ones((2, 1)), np.array([[1.0], [bad]])
            )
    with pytest.raises(BitallocError, match="nothing to choose from for second"):
        Instance(
            ("first", "second"), (Option("gptq", 2, 64, 0),), np.ones(2), np.ones((2, 1)), np.array([[1.0], [np.inf]])
        )
