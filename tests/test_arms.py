"""Whoever compares plans at equal bytes leaves the arms of the analysis out."""

import pandas as pd
import pytest

from bitalloc import report, tables
from bitalloc.analyses.study import Study
from bitalloc.config import Analyze, Gates
from bitalloc.figures.domains import _Data
from bitalloc.figures.evidence import Evidence
from bitalloc.gates import gate_allocate, gate_downstream, gate_pilot
from tests.simulated import Results, empty, gates, simulate


@pytest.fixture(scope="module")
def plain() -> Results:
    return simulate(pool=2, items=20, windows=6, budgets=("2.6bpw", "3.3bpw"))


@pytest.fixture(scope="module")
def armed(plain) -> Results:
    """The same with a leaked plan at a budget, two of the component arm, one by position and one of the user's."""
    first = plain.plans[plain.plans["strategy"] == "uniform"].iloc[0]
    component = {"strategy": "component", "budget": "component mlp", "budget_bytes": 1, "bits_per_weight": 2.5}
    rows = [first.to_dict() | {"plan": "leaked-2.6bpw", "strategy": "leaked"}]
    rows += [first.to_dict() | component | {"plan": f"component-mlp-{step}"} for step in (1, 2)]
    free = {"budget_bytes": 1, "bits_per_weight": 9.0} | dict.fromkeys(
        ["objective", "lower_bound", "gap"], float("nan")
    )
    for strategy, plan in (("position", "position-early"), ("file", "mine")):
        rows.append(first.to_dict() | free | {"plan": plan, "strategy": strategy, "budget": strategy})
    plans = pd.concat([plain.plans, pd.DataFrame(rows)], ignore_index=True)

    def with_copies(frame: pd.DataFrame) -> pd.DataFrame:
        copied = frame[frame["plan"] == first["plan"]]
        return pd.concat([frame, *(copied.assign(plan=row["plan"]) for row in rows)], ignore_index=True)

    return Results(plans, with_copies(plain.evaluate), with_copies(plain.responses))


def test_they_are_told_apart_by_their_strategy(plain, armed):
    pd.testing.assert_frame_equal(tables.without_arms(armed.plans), plain.plans)
    candidates = armed.plans.assign(strategy=armed.plans["strategy"].replace("leaked", "leaked_2"))
    pd.testing.assert_frame_equal(tables.without_arms(candidates), plain.plans)


def test_gates_see_no_difference(plain, armed):
    for gate in (gate_pilot, gate_downstream):
        plan_scores = [{"plans": each.plans, "evaluate": each.evaluate} for each in (plain, armed)]
        pd.testing.assert_frame_equal(*(gate(gates=Gates(), **each) for each in plan_scores))
    pd.testing.assert_frame_equal(*(gate_allocate(plans=each.plans, gates=Gates()) for each in (plain, armed)))


def test_the_table_and_the_figures_see_no_difference(plain, armed):
    none = empty(tables.CHECKPOINTS, [])
    assert report.table(plain.plans, plain.evaluate, none, gates()) == report.table(
        armed.plans, armed.evaluate, none, gates()
    )
    goodhart = pd.DataFrame({
        "analysis": ["gain"], "proxy": ["nll:world"], "gold": ["ppl:world"], "budget": ["2.6bpw"],
        "statistic": ["regret_points"], "value": [1.0], "lo": [0.0], "hi": [2.0],
    })  # fmt: skip
    pages = [Evidence(each.plans, each.evaluate, goodhart, ["world"]) for each in (plain, armed)]
    assert pages[0].budgets == pages[1].budgets and pages[0].plans["plan"].tolist() == pages[1].plans["plan"].tolist()
    domains = [_Data(each.plans, none, goodhart, ["world"]) for each in (plain, armed)]
    assert domains[0].budgets == domains[1].budgets and domains[0].strategies == domains[1].strategies


def test_a_plan_of_unknown_cost_takes_the_prediction_from_nobody(plain, armed):
    settings = Analyze(resamples=50, folds=2)
    studies = [Study(each.plans, each.evaluate, each.responses, settings, 0) for each in (plain, armed)]
    assert list(studies[0].proxies) == list(studies[1].proxies) and "objective" in studies[1].proxies
    assert studies[0].strata == studies[1].strata
