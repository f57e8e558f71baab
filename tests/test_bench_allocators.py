"""benchmarks/bench_allocators.py: seeded sets that differ, structures that are what they say, counts that are equal."""

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bitalloc.strategies import Instance
from bitalloc.strategies.optimal import solve

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_allocators")


def test_sets_are_seeded_and_share_no_instance(bench):
    drawn = {chosen: [given for _, given, _ in bench.problems(chosen, {12: 2})] for chosen in bench.SETS}
    again = [given for _, given, _ in bench.problems("test", {12: 2})]
    assert all((one.costs_NK == two.costs_NK).all() for one, two in zip(drawn["test"], again, strict=True))
    seen = [{given.costs_NK.tobytes() for given in each} for each in drawn.values()]
    assert [len(each) for each in seen] == [2 * len(bench.STRUCTURES)] * 3
    assert len(set.union(*seen)) == 6 * len(bench.STRUCTURES)


def test_structures_are_what_they_say(bench):
    def spread(structure):  # of what the same option costs in layers of one shape
        given = bench.instance(structure, 70, seed=1)
        return np.log(given.costs_NK[::7, 0]).std()

    assert spread("flat") < 0.3 and spread("law") > 1
    costs = bench.instance("outliers", 64, seed=1).costs_NK[:, 0]
    assert (costs > 100 * np.median(costs)).sum() == 4
    given = bench.instance("proportional", 14, seed=1)
    saved, added = (np.diff(table[0][[0, 4, 8]]) for table in (-given.costs_NK, given.nbytes_NK))
    assert saved / added == pytest.approx(np.full(2, saved[0] / added[0]), rel=0.02)


def test_searches_cost_equally_many_plans_and_never_beat_the_optimum(bench, monkeypatch):
    counted, objective = [], Instance.objective
    what, given, budget = next(bench.problems("test", {12: 1}))
    optimum = solve(given, budget).objective
    for name, (evaluations, run) in bench.runs({"offspring": 4, "switches": 1}, 144, what["seed"]).items():
        with monkeypatch.context() as patch:
            patch.setattr(Instance, "objective", lambda self, plan: counted.append(1) or objective(self, plan))
            plan = run(given, budget)
        assert given.size(plan) <= budget and given.objective(plan) >= optimum * (1 - 1e-12)
        if name in ("random", "evolve"):
            assert 140 < len(counted) <= evaluations == 144
        counted.clear()


def test_summary_has_median_and_worst_of_each_structure(bench):
    rows = [{"layers": 12, "strategy": "s", "structure": structure, "regret": regret, "evaluations": 1, "cpu_s": 0.1}
            for structure in ("flat", "law") for regret in (0.1, 0.2, 0.6)]  # fmt: skip
    found = bench.summarised(pd.DataFrame(rows))
    assert found["structure"].tolist() == ["law", "flat"]
    assert found[["median_regret", "worst_regret", "instances"]].to_numpy().tolist() == [[0.2, 0.6, 3]] * 2
