"""Plans that harm one component in steps: what they touch, in which order, and that components can be compared."""

import dataclasses

import numpy as np
import pytest

from bitalloc.option import Option
from bitalloc.strategies.component import STEPS, components
from bitalloc.strategies.instance import Instance
from tests.strategies.test_strategies import SHAPES, model

KINDS = ["attention"] * 4 + ["mlp"] * 3


def with_16_bits(instance: Instance) -> Instance:
    sides = [rows * columns for rows, columns in SHAPES] * (len(instance.layers) // len(SHAPES))
    return dataclasses.replace(
        instance,
        options=(*instance.options, Option("none", 16, 0, 0)),
        nbytes_NK=np.column_stack([instance.nbytes_NK, 2 * np.array(sides)]),
        costs_NK=np.column_stack([instance.costs_NK, np.zeros(len(sides))]),
    )


@pytest.fixture(scope="module")
def instance() -> Instance:
    return with_16_bits(model(blocks=2))


def test_only_the_component_is_harmed_and_damage_grows(instance):
    kind_N = np.array(KINDS * 2)
    found = list(components(instance, kind_N))
    assert list(dict.fromkeys(name for name, _ in found)) == ["attention", "mlp"]
    for component in ("attention", "mlp"):
        plans = [choice_N for name, choice_N in found if name == component]
        assert 3 <= len(plans) <= STEPS
        for choice_N in plans:
            assert len(set(choice_N[kind_N == component])) == 1
            assert all(instance.options[k].bits == 16 for k in choice_N[kind_N != component])
            assert instance.options[choice_N[kind_N == component][0]].bits < 16
        costs = [instance.objective(choice_N) for choice_N in plans]
        assert costs == sorted(set(costs))


def test_losses_of_one_component_are_found_in_the_other(instance):
    found = list(components(instance, KINDS * 2))
    ends = {
        name: [instance.objective(choice_N) for other, choice_N in found if other == name]
        for name in ("attention", "mlp")
    }
    for here, there in (("attention", "mlp"), ("mlp", "attention")):
        assert all(0.5 * ends[there][0] < cost < 2 * ends[there][-1] for cost in ends[here])


def test_they_repeat_and_one_component_alone_has_nothing_to_be_compared_with(instance):
    again = [(name, choice_N.tolist()) for name, choice_N in components(instance, KINDS * 2)]
    assert again == [(name, choice_N.tolist()) for name, choice_N in components(instance, KINDS * 2)]
    assert not list(components(instance, ["mixer"] * len(instance.layers)))


def test_an_option_that_one_member_lacks_is_no_step(instance):
    costs_NK = instance.costs_NK.copy()
    costs_NK[0, [option.bits == 2 for option in instance.options]] = np.inf
    ragged = dataclasses.replace(instance, costs_NK=costs_NK)
    for name, choice_N in components(ragged, KINDS * 2):
        assert name == "mlp" or all(ragged.options[k].bits > 2 for k in choice_N)
