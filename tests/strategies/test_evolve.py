"""Evolution on additive costs: the optimum of a small instance, plans that are costed, and a start that is polished."""

from itertools import product

import numpy as np
import pytest

from bitalloc.strategies import STRATEGIES
from bitalloc.strategies.evolve import evolve, levels
from bitalloc.strategies.instance import Instance
from tests.strategies.test_strategies import OPTIONS, between, model


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_equals_brute_force_on_a_small_instance(share: float) -> None:
    whole = model(2, 1, [option for option in OPTIONS if option.rank == 0 and option.group_size == 64])
    parts = whole.weights_N[:5], whole.nbytes_NK[:5], whole.costs_NK[:5]
    instance = Instance(whole.layers[:5], whole.options, *parts)
    budget = between(instance, share)
    plans = (np.array(plan) for plan in product(range(3), repeat=5))
    best = min(instance.objective(plan) for plan in plans if instance.size(plan) <= budget)
    assert instance.objective(evolve(instance, budget)) == pytest.approx(best, rel=1e-12)


def test_costs_as_many_plans_as_it_may_and_gains_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    instance, costed = model(3), []
    objective = Instance.objective
    monkeypatch.setattr(Instance, "objective", lambda self, plan: costed.append(1) or objective(self, plan))
    found = [evolve(instance, between(instance, 0.4), evaluations=count) for count in (1, 97, 993)]
    assert len(costed) == 1 + 97 + 993
    assert np.all(np.diff([objective(instance, plan) for plan in found]) < 0)


def test_a_start_is_polished_never_spoilt() -> None:
    instance = model(4)
    for share in (0.2, 0.6):
        budget = between(instance, share)
        for name in ("uniform", "greedy", "optimal"):
            start_N = STRATEGIES[name](instance, budget)
            assert instance.objective(evolve(instance, budget, start_N=start_N)) <= instance.objective(start_N)
        from_random = evolve(instance, budget, start_N=STRATEGIES["random"](instance, budget, seed=1))
        assert instance.size(from_random) <= budget


def test_levels_are_efficient_options_by_rising_bytes() -> None:
    instance = model(5)
    for i, options in enumerate(levels(instance)):
        assert (np.diff(instance.nbytes_NK[i, options]) > 0).all() and (
            np.diff(instance.costs_NK[i, options]) < 0
        ).all()
