import importlib

import numpy as np
import pandas as pd
import pytest

from bitalloc import tables
from bitalloc.analyze import analyze, summary
from bitalloc.config import Analyze
from bitalloc.errors import BitallocError
from bitalloc.statistics import benjamini_hochberg, holm
from tests.simulated import simulate

FAST = Analyze(resamples=200, folds=10)


def run(results, settings=FAST):
    return analyze(results.plans, results.evaluate, results.responses, settings=settings, seed=0)


def one(goodhart, **where):
    for column, value in where.items():
        goodhart = goodhart[goodhart[column] == value]
    assert len(goodhart) == 1
    return goodhart.iloc[0]


@pytest.fixture(scope="module")
def results():
    return simulate()


@pytest.fixture(scope="module")
def goodhart(results):
    return run(results)


# ------------------------------------------------------------------ planted truths


def test_unrelated_tasks_have_intervals_that_cover_zero():
    """60 tasks without any relation, over three sets of plans."""
    covered = []
    for seed in range(3):
        slopes = {f"task{i}": 0.0 for i in range(20)}
        null = simulate(
            seed, slopes=slopes, budgets=("2.6bpw",), corpora=("world",), items=100, windows=12, strategies=("uniform",)
        )
        found = run(null, Analyze(resamples=150, folds=1))
        rows = found[(found["statistic"] == "spearman") & (found["proxy"] == "nll:world") & (found["budget"] == "all")]
        covered += ((rows["lo"] <= 0) & (rows["hi"] >= 0)).tolist()
    assert len(covered) == 60
    assert sum(covered) >= 54


def test_a_strong_relation_is_found_and_chance_is_not(goodhart, results):
    for gold in ("facts", "sums", "keys"):
        row = one(goodhart, statistic="spearman", proxy="nll:world", gold=gold, budget="all")
        assert row["hi"] < -0.4 and row["status"] == "ok" and row["n"] == 78
    row = one(goodhart, statistic="spearman", proxy="nll:world", gold="passkey", budget="all")
    assert row["lo"] < 0 < row["hi"]
    said = summary(goodhart, results.evaluate, results.plans)
    (sentence,) = [each for each in said if each.startswith("PPL and accuracy agree")]
    agreed, open_ = sentence.split(";")
    assert "agree on facts" in agreed and "passkey" not in agreed
    assert "passkey" in open_ and "covers 0" in open_


def test_the_sentence_says_what_the_table_says(goodhart, results):
    sentences = summary(goodhart, results.evaluate, results.plans)
    assert sentences[0].startswith("Differences below about") and "rank correlation" in sentences[0]
    row = one(goodhart, statistic="spearman", proxy="nll:world", gold="sums", budget="all")
    assert f"sums (rho {row['value']:.2f} [{row['lo']:.2f}, {row['hi']:.2f}])" in " ".join(sentences)
    covering = goodhart[goodhart["analysis"] == "correlation"].assign(lo=-0.3, hi=0.2)
    doubtful = pd.concat([covering, goodhart[goodhart["analysis"] != "correlation"]])
    assert "agree" not in " ".join(summary(doubtful, results.evaluate, results.plans))


def test_a_plan_under_two_names_counts_once(goodhart):
    row = one(goodhart, statistic="spearman", proxy="nll:world", gold="facts", budget="2.6bpw")
    assert row["n"] == 26  # 6 strategies and 20 random plans; best is one of them


def test_regret_ranks_the_choosers(goodhart):
    rows = goodhart[(goodhart["statistic"] == "regret_points") & (goodhart["budget"] == "all")]
    sums = rows[rows["gold"] == "sums"].set_index("proxy")["value"]
    assert sums["nll:world"] < 2 and sums["uniform"] > 10
    assert sums["random"] > 10


def test_gains_are_those_of_the_responses(goodhart, results):
    nll = results.responses.query("metric == 'nll_nats_per_token' and task == 'world/report'")
    mean = nll.groupby("plan")["value"].mean()
    row = one(goodhart, proxy="best", gold="ppl:world", budget="2.6bpw", statistic="ppl_gain_percent")
    gain = 100 * (1 - np.exp(mean["best-2.6bpw"] - mean["uniform-2.6bpw"]))
    assert row["value"] == pytest.approx(gain) and row["lo"] < gain < row["hi"]
    tests = goodhart[goodhart["statistic"] == "mcnemar_p"]
    declared = tests[tests["proxy"] == "best"]
    assert len(declared) == 4 * 3
    assert declared["p_adjusted"].to_numpy() == pytest.approx(holm(declared["value"]))
    others = tests[tests["proxy"] != "best"]
    assert others["p_adjusted"].to_numpy() == pytest.approx(benjamini_hochberg(others["value"]))


def test_divergent_pairs_are_counted_and_planted_ones_found():
    world = simulate(slopes={"facts": -20.0}, level={"facts": 1.0})
    contrary = run(world)
    place = {"analysis": "divergence", "gold": "facts", "budget": "2.6bpw"}
    share = one(contrary, statistic="divergent_share", **place)
    expected, pairs = (one(contrary, statistic=s, **place)["value"] for s in ("expected_by_chance", "pairs"))
    assert share["value"] > 0.3 and share["lo"] > 0.1 and expected == pytest.approx(0.025 * pairs)
    row = one(contrary, statistic="spearman", proxy="nll:world", gold="facts", budget="all")
    assert row["lo"] > 0
    said = " ".join(summary(contrary, world.evaluate, world.plans))
    assert "the one with the better PPL (by 1 %) is significantly worse in" in said and "% on facts at 2.6bpw" in said
    assert "Lower PPL goes with lower accuracy on facts" in said
    assert "Choosing harder by PPL makes accuracy worse on facts" in said


def test_floor_and_saturated_tasks_make_no_claim():
    world = simulate(slopes={"facts": 12.0, "keys": 12.0, "sums": 1.0}, level={"facts": -3.0, "sums": 14.0})
    found = run(world)
    status = found[(found["budget"] == "all") & (found["analysis"] != "flips")].groupby("gold")["status"].agg(set)
    assert status["facts"] == {"floor"} and status["sums"] == {"saturated"} and status["keys"] == {"ok"}
    text = " ".join(summary(found, world.evaluate, world.plans))
    assert "facts: not above chance" in text.lower() and "sums: as good as the reference" in text
    assert "facts (rho" not in text and "sums (rho" not in text


def test_few_plans_and_no_tasks_still_give_a_table():
    few = simulate(pool=0, strategies=("uniform", "optimal"), slopes={})
    found = run(few)
    correlation = found[found["analysis"].isin(["correlation", "overoptimisation"])]
    assert set(correlation["status"]) == {"too_few"} and correlation["lo"].isna().all()
    sentences = summary(found, few.evaluate, few.plans)
    assert any(each.startswith("At equal bytes") for each in sentences) and "agree " not in " ".join(sentences)


def test_strata_of_other_sizes_are_pooled_though_large_ones_have_fewer_resamples_of_tau(monkeypatch):
    monkeypatch.setattr(importlib.import_module("bitalloc.analyses.correlation"), "PAIRS", 20_000)
    results = simulate(pool=8, items=40)
    results.plans = results.plans.drop(results.plans.index[results.plans["plan"].str.startswith("random-2.6bpw")][:2])
    found = run(results, Analyze(resamples=400, folds=2))
    place = {"statistic": "kendall", "proxy": "nll:world", "gold": "facts"}
    assert one(found, budget="2.6bpw", **place)["n"] < one(found, budget="3.3bpw", **place)["n"]
    pooled = one(found, budget="all", **place)
    assert pooled["lo"] < pooled["value"] < pooled["hi"]


def test_perplexity_alone_still_gives_a_table():
    alone = simulate(pool=2, slopes={})
    alone.responses = alone.responses[alone.responses["suite"] == "perplexity"]
    alone.evaluate = alone.evaluate[alone.evaluate["suite"] == "perplexity"]
    found = run(alone)
    assert set(found["analysis"]) == {"power", "regressional", "gain"}
    assert summary(found, alone.evaluate, alone.plans)


def test_the_table_fits_its_schema_and_repeats(goodhart, results, tmp_path):
    tables.GOODHART.write(goodhart, tmp_path / "goodhart.parquet")
    pd.testing.assert_frame_equal(run(results), goodhart)


def test_unpaired_responses_are_refused(results):
    dropped = results.responses.drop(results.responses.query("plan == 'optimal-2.6bpw' and metric == 'acc'").index[:1])
    with pytest.raises(BitallocError, match="cannot be paired; rerun evaluate"):
        analyze(results.plans, results.evaluate, dropped, settings=FAST, seed=0)
    none = results.responses[results.responses["metric"] == "acc"]
    with pytest.raises(BitallocError, match="add the suite perplexity"):
        analyze(results.plans, results.evaluate, none, settings=FAST, seed=0)


def test_a_fallback_to_uniform_is_the_message(results):
    frame = analyze(results.plans, results.evaluate, results.responses, settings=FAST, seed=0)
    row = {"check": "objective_gap", "mode": "fallback", "go": False, "value": 0.001, "threshold": 0.005}
    said = summary(frame, results.evaluate, results.plans, pd.DataFrame([row]))
    assert said[0].startswith("Uniform is near-optimal") and "0.1%" in said[0]
    assert said[1:] == summary(frame, results.evaluate, results.plans, pd.DataFrame([row | {"go": True}]))


def test_tasks_of_lm_eval_are_golds_like_any_other(goodhart, results):
    """The metric that counts stands in for `acc`; other metrics and the subjects of mmlu change nothing."""

    def renamed(frame):
        ours = frame["suite"] == "world"
        lm_eval = {"suite": "downstream", "metric": "acc_norm,none"}
        extra = frame[ours].assign(suite="downstream", metric="acc,none", status="floor", value=0.0)
        part = frame[ours & (frame["task"] == "facts")].assign(**lm_eval, task="facts_anatomy")
        return pd.concat([frame[~ours], frame[ours].assign(**lm_eval), extra, part])[frame.columns]

    found = analyze(results.plans, renamed(results.evaluate), renamed(results.responses), settings=FAST, seed=0)
    pd.testing.assert_frame_equal(found, goodhart)
    responses = renamed(results.responses)
    first = responses[(responses["plan"] == "reference") & (responses["metric"] == "acc_norm,none")].index[0]
    other = results.responses.replace({"task": {"sums": "facts_held_out"}})  # a task of its own, whatever its name
    assert "facts_held_out" in set(analyze(results.plans, results.evaluate, other, settings=FAST, seed=0)["gold"])
    failed = analyze(results.plans, renamed(results.evaluate), responses.drop(first), settings=FAST, seed=0)
    assert one(failed, statistic="mcnemar_p", gold="facts", proxy="best", budget="2.6bpw")["n"] == 299
