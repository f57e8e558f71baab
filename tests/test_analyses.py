"""Planted truths through the whole analysis; `make bench-goodhart` asks the same of 500 studies a world."""

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from bitalloc.analyze import analyze, summary
from bitalloc.config import Analyze
from bitalloc.errors import BitallocError
from tests.planted import BUDGETS, LEAK, WORLDS, planted, population

FAST = Analyze(resamples=200, folds=10, margin=5.0)


def run(results, **frames):
    tables = {"plans": results.plans, "evaluate": results.evaluate, "responses": results.responses} | frames
    return analyze(**tables, settings=FAST, seed=0)


@pytest.fixture(scope="module")
def known():
    return planted(WORLDS["known"], 0, items=600, windows=96)


@pytest.fixture(scope="module")
def found(known):
    return run(known.results)


@pytest.fixture(scope="module")
def table(found):
    return found.set_index(["analysis", "proxy", "gold", "budget", "statistic"]).sort_index()


@pytest.fixture(scope="module")
def simulated():
    """Eight studies of the world `known`, judged by the benchmark's own rules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        bench = importlib.import_module("bench_goodhart")
        truths = population(WORLDS["known"], plans=1000, draws=8)
        records = [("known", each) for seed in range(8) for each in bench.simulate(WORLDS["known"], seed, truths)]
        return bench.summed(records).set_index(["kind", "name"])


def test_intervals_cover_what_was_planted(simulated):
    rows = pd.concat([simulated.loc["interval"], simulated.loc["bound"]])
    assert rows["rate"].mean() > 0.93
    assert (rows["rate"] * rows["n"] >= binom.ppf(1e-4, rows["n"], 0.95)).all()


def test_true_nulls_are_rarely_rejected(simulated):
    rows = simulated.loc["error"]
    assert rows["rate"].mean() < 0.06
    assert (rows["rate"] * rows["n"] <= binom.ppf(1 - 1e-4, rows["n"], 0.05)).all()


def test_the_naive_estimators_fail(simulated):
    biased = simulated.loc["naive bias"]["bias"]
    assert biased["regret on the same items, idle"] > 2.5
    assert abs(simulated.loc["bias", "cross-fitted regret, idle"]["bias"]) < 1.5
    assert simulated.loc["naive error", "one rho over all budgets is not 0, idle"]["rate"] > 0.9
    assert simulated.loc["naive error", "`not significant` read as `no loss`, edge"]["rate"] > 0.3
    assert simulated.loc["naive interval", "spearman, percentiles over items alone, told"]["rate"] < 0.9


def test_power_comes_first(known, found):
    assert found["analysis"].iloc[0] == "power"
    said = summary(found, known.results.evaluate, known.results.plans)
    assert said[0].startswith("Differences below about")


def test_components_part_at_equal_perplexity_and_nowhere_else(table, known):
    row = table.loc[("causal", "nll:world", "told", "component attention - mlp", "matched_points")]
    assert row["lo"] > 0 and row["p_adjusted"] < 0.05 and 2 < row["value"] < 6
    row = table.loc[("causal", "nll:world", "idle", "component attention - mlp", "matched_points")]
    assert row["lo"] < 0 < row["hi"]
    said = " ".join(summary(table.reset_index(), known.results.evaluate, known.results.plans))
    assert "causal: difference between components at equal PPL: told at component attention - mlp" in said


def test_a_leak_shows_in_the_windows_it_saw_alone(table):
    for budget in BUDGETS:
        seen = table.loc[("leakage", "leaked", "ppl:world", budget, "lead_nats")]
        assert seen["lo"] < LEAK < seen["hi"]
        told = table.loc[("leakage", "leaked", "told", budget, "lead_points")]
        assert told["lo"] < 0 < told["hi"]


def test_components_and_leaks_stay_out_of_the_pool(table):
    assert table.loc[("correlation", "nll:world", "told", "all", "spearman")]["n"] == 2 * 24
    assert not any(
        str(budget).startswith("component") for budget in table.loc["correlation"].index.get_level_values("budget")
    )


def test_choosing_harder_backfires_where_that_was_planted(table, known):
    beta = table.loc[("overoptimisation", "nll:world", "told", "all", "beta_points")]
    assert beta["lo"] > 0 and beta["value"] == pytest.approx(4, abs=3)
    turning = table.loc[("overoptimisation", "nll:world", "told", "all", "turning_pressure")]
    assert turning["status"] == "ok" and turning["lo"] < turning["value"] < turning["hi"]
    assert ("overoptimisation", "nll:world", "idle", "all", "turning_pressure") not in table.index
    said = " ".join(summary(table.reset_index(), known.results.evaluate, known.results.plans))
    assert "Choosing harder by PPL buys less and less on told" in said


def test_a_pool_may_be_asked_fewer_items(known, found):
    """Named plans keep all of theirs; what is said of the pool is said from the items that its plans share."""
    results = known.results
    first = results.responses["item"] < 200
    pool = results.responses["plan"].str.startswith("random") & (results.responses["suite"] == "world")
    fewer = results.responses[~pool | first]
    found, whole = run(results, responses=fewer), found
    gains = [
        each[each["analysis"].isin(["gain", "flips", "causal", "leakage"])].reset_index(drop=True)
        for each in (found, whole)
    ]
    pd.testing.assert_frame_equal(gains[0].drop(columns="status"), gains[1].drop(columns="status"))
    all_asked = run(results, responses=results.responses[(results.responses["suite"] != "world") | first])
    ranks = [
        each[each["analysis"].isin(["correlation", "regret"])].reset_index(drop=True) for each in (found, all_asked)
    ]
    pd.testing.assert_frame_equal(*ranks)
    none = fewer[~(fewer["plan"].str.startswith("random") & (fewer["task"] == "told"))]
    one = results.responses[pool & (results.responses["task"] == "told") & (results.responses["item"] == 0)]
    apart = pd.concat([none, one.assign(item=np.arange(len(one)))])  # each a different item
    with pytest.raises(BitallocError, match="no item of told in common"):
        run(results, responses=apart)


def test_a_rerun_of_the_reference_is_the_floor_of_flips(known, table):
    assert table.loc[("flips", "reference-rerun", "told", "all", "flips_percent")]["status"] == "missing"
    responses = known.results.responses
    again = responses[responses["plan"] == "reference"].assign(plan="reference-rerun")
    told = again.index[again["task"].eq("told") & again["item"].isin([3, 4])]
    again.loc[told, "value"] = 1 - again.loc[told, "value"]
    found = run(known.results, responses=pd.concat([responses, again]))
    rows = found[(found["proxy"] == "reference-rerun") & (found["gold"] == "told")].set_index("statistic")["value"]
    assert rows["flips_percent"] == pytest.approx(100 * 2 / 600)
    assert rows["right_to_wrong_percent"] + rows["wrong_to_right_percent"] == pytest.approx(rows["flips_percent"])
    assert rows["wrong_to_wrong_percent"] > 0
    said = " ".join(summary(found, known.results.evaluate, known.results.plans))
    assert "a rerun of the reference" in said and "was not made" not in said
