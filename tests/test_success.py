"""The table of what was reached: levels by the value and by the whole interval, and rows for what was not measured."""

import pandas as pd
import pytest

from bitalloc import tables
from bitalloc.analyze import analyze
from bitalloc.config import Analyze
from bitalloc.success import success
from tests.simulated import gates, law, simulate


@pytest.fixture(scope="module")
def results():
    return simulate(pool=0, items=60)


@pytest.fixture(scope="module")
def goodhart(results):
    settings = Analyze(resamples=50, folds=2)
    return analyze(results.plans, results.evaluate, results.responses, settings=settings, seed=0)


def reached(results, goodhart, form: str = "multiplicative") -> pd.DataFrame:
    return success(results.plans, results.evaluate, goodhart, law(), gates(), form=form)


def test_every_budget_and_corpus_has_a_row_and_the_table_repeats(results, goodhart, tmp_path):
    frame = reached(results, goodhart)
    tables.SUCCESS.write(frame, tmp_path / "a.parquet")
    tables.SUCCESS.write(reached(results, goodhart), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    count = frame.groupby("criterion").size()
    assert count.to_dict() == {"accuracy_drop_points": 3, "ppl_gain_percent": 6, "r2_log": 1, "r2_loo": 1}
    assert (frame["status"] == "ok").all()


def test_cells_are_those_of_goodhart_and_the_bad_end_decides(results, goodhart):
    at = goodhart[(goodhart["statistic"] == "ppl_gain_percent") & (goodhart["proxy"] == "best")].index[0]
    changed = goodhart.copy()
    changed.loc[at, ["value", "lo", "hi"]] = (16.0, 4.9, 27.0)
    row = reached(results, changed).query("criterion == 'ppl_gain_percent'").iloc[0]
    assert (row["minimal"], row["target"], row["stretch"], row["comparison"], row["unit"]) == (3, 5, 15, ">=", "%")
    assert (row["value"], row["level"], row["level_sure"]) == (16.0, "stretch", "minimal")
    assert row["verdicts"] == "3 of 5 GO; NO-GO r2_rank (fallback); NO-GO manual_gain (warn)"


def test_the_task_that_loses_most_counts_with_its_ends_turned(results, goodhart):
    changed = goodhart.copy()
    drop = (changed["statistic"] == "accuracy_points_vs_reference") & (changed["proxy"] == "best")
    changed.loc[drop, ["value", "lo", "hi"]] = (0.5, -0.5, 1.0)
    worst = drop & (changed["gold"] == "sums") & (changed["budget"] == "2.6bpw")
    changed.loc[worst, ["value", "lo", "hi"]] = (-1.5, -4.0, 0.5)
    row = reached(results, changed).query("criterion == 'accuracy_drop_points' and budget == '2.6bpw'").iloc[0]
    assert (row["gold"], row["value"], row["lo"], row["hi"]) == ("sums", 1.5, -0.5, 4.0)
    assert (row["level"], row["level_sure"], row["comparison"]) == ("target", "minimal", "<=")


def test_what_was_not_measured_is_a_row_without_a_value(goodhart, results, tmp_path):
    floor = goodhart.assign(status=goodhart["status"].mask(goodhart["proxy"] == "best", "floor"))
    frame = success(results.plans, results.evaluate, floor, law(), gates(), form="interpolation")
    tables.SUCCESS.write(frame, tmp_path / "success.parquet")
    drops = frame[frame["criterion"] == "accuracy_drop_points"]
    assert set(drops["status"]) == {"no task above chance"} and set(drops["level"]) == {"none"}
    assert frame.set_index("criterion").loc["r2_log", "status"] == "not defined"
    nothing = goodhart[goodhart["analysis"] != "gain"]
    bare = success(results.plans, results.evaluate, nothing, law(), gates(), form="multiplicative")
    assert set(bare["status"]) == {"no uniform plan to compare with", "no task was run", "ok"}


def test_agreement_with_the_reference_is_no_task():
    alone = simulate(pool=0, slopes={})
    settings = Analyze(resamples=20, folds=2)
    goodhart = analyze(alone.plans, alone.evaluate, alone.responses, settings=settings, seed=0)
    assert "accuracy_points_vs_reference" in set(goodhart["statistic"])
    drops = reached(alone, goodhart).query("criterion == 'accuracy_drop_points'")
    assert set(drops["status"]) == {"no task was run"} and drops["value"].isna().all()
