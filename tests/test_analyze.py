import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr

from bitalloc import tables
from bitalloc.analyze import analyze, summary
from bitalloc.config import Analyze
from bitalloc.errors import BitallocError
from bitalloc.statistics import (
    cross_fitted_regret,
    fisher_interval,
    holm,
    mcnemar_p,
    naive_regret,
    resample,
    spearman,
    split_items,
)
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


# ------------------------------------------------------------------ formulae


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert float(mcnemar_p(a, b)) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1.0, len(p) * min(p)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_spearman_equals_scipy_with_ties(pairs):
    x, y = np.array(pairs, dtype=float).T
    rho = spearman(x[None], y[None])[0]
    if np.ptp(x) and np.ptp(y):
        assert rho == pytest.approx(spearmanr(x, y).statistic)
    else:
        assert np.isnan(rho)


def test_resamples_keep_their_size_and_whole_clusters():
    rng = np.random.default_rng(0)
    few, many = np.repeat(range(4), 25), np.repeat(range(20), 5)
    counts = resample(few, 50, rng)
    assert (counts.reshape(50, 4, 25).sum(2) == 25).all()  # strata keep their size
    counts = resample(many, 50, rng).reshape(50, 20, 5)
    assert (counts == counts[:, :, :1]).all() and (counts[:, :, 0].sum(1) == 20).all()


def test_halves_are_balanced_in_every_cluster():
    half = split_items(np.repeat(range(3), 11), 20, np.random.default_rng(0)).reshape(20, 3, 11)
    assert set(half.sum(2).ravel()) <= {5, 6}


def test_naive_regret_is_biased_where_the_cross_fitted_is_not():
    """60 plans of equal accuracy, the pick independent of the gold: the truth is 0."""
    naive, crossed = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = rng.random(164) < 0.45
        gold = np.where(rng.random((60, 164)) < np.where(base, 0.111, 0.0909), ~base, base).astype(float)
        pick = np.eye(60)[rng.integers(60)]
        half = split_items(np.zeros(164), 5, rng)
        naive.append(naive_regret(gold, pick))
        crossed.append(cross_fitted_regret(gold, pick, half).mean())
    assert np.mean(naive) > 4
    assert abs(np.mean(crossed)) < 1


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
        rows = found[
            (found["analysis"] == "correlation") & (found["proxy"] == "nll:world") & (found["budget"] == "all")
        ]
        covered += ((rows["lo"] <= 0) & (rows["hi"] >= 0)).tolist()
    assert len(covered) == 60
    assert sum(covered) >= 54


def test_a_strong_relation_is_found_and_chance_is_not(goodhart, results):
    for gold in ("facts", "sums", "keys"):
        row = one(goodhart, analysis="correlation", proxy="nll:world", gold=gold, budget="all")
        assert row["hi"] < -0.4 and row["status"] == "ok" and row["n"] == 78
    row = one(goodhart, analysis="correlation", proxy="nll:world", gold="passkey", budget="all")
    assert row["lo"] < 0 < row["hi"]
    sentence = summary(goodhart, results.evaluate, results.plans)[0]
    agreed, open_ = sentence.split(";")
    assert "agree on facts" in agreed and "passkey" not in agreed
    assert "passkey" in open_ and "covers 0" in open_


def test_the_sentence_says_what_the_table_says(goodhart, results):
    sentences = summary(goodhart, results.evaluate, results.plans)
    assert 2 <= len(sentences) <= 4
    row = one(goodhart, analysis="correlation", proxy="nll:world", gold="sums", budget="all")
    assert f"sums (rho {row['value']:.2f} [{row['lo']:.2f}, {row['hi']:.2f}])" in sentences[0]
    covering = goodhart[goodhart["analysis"] == "correlation"].assign(lo=-0.3, hi=0.2)
    doubtful = pd.concat([covering, goodhart[goodhart["analysis"] != "correlation"]])
    assert "agree" not in " ".join(summary(doubtful, results.evaluate, results.plans))


def test_a_plan_under_two_names_counts_once(goodhart):
    row = one(goodhart, analysis="correlation", proxy="nll:world", gold="facts", budget="2.6bpw")
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
    primaries = goodhart[goodhart["p_adjusted"].notna()]
    assert len(primaries) == 4 * 3 and set(primaries["proxy"]) == {"best"}
    assert (primaries["p_adjusted"] >= primaries["value"]).all()


def test_divergent_pairs_are_counted_and_planted_ones_found():
    contrary = run(simulate(slopes={"facts": -20.0}, level={"facts": 1.0}))
    place = {"analysis": "divergence", "gold": "facts", "budget": "2.6bpw"}
    share = one(contrary, statistic="divergent_share", **place)
    expected, pairs = (one(contrary, statistic=s, **place)["value"] for s in ("expected_by_chance", "pairs"))
    assert share["value"] > 0.3 and share["lo"] > 0.1 and expected == pytest.approx(0.025 * pairs)
    row = one(contrary, analysis="correlation", proxy="nll:world", gold="facts", budget="all")
    assert row["lo"] > 0


def test_floor_and_saturated_tasks_make_no_claim():
    world = simulate(slopes={"facts": 12.0, "keys": 12.0, "sums": 1.0}, level={"facts": -3.0, "sums": 14.0})
    found = run(world)
    status = found[found["budget"] == "all"].groupby("gold")["status"].agg(set)
    assert status["facts"] == {"floor"} and status["sums"] == {"saturated"} and status["keys"] == {"ok"}
    text = " ".join(summary(found, world.evaluate, world.plans))
    assert "facts: not above chance" in text.lower() and "sums: as good as the reference" in text
    assert "facts (rho" not in text and "sums (rho" not in text


def test_few_plans_and_no_tasks_still_give_a_table():
    few = simulate(pool=0, strategies=("uniform", "optimal"), slopes={})
    found = run(few)
    correlation = found[found["analysis"] == "correlation"]
    assert set(correlation["status"]) == {"too_few"} and correlation["lo"].isna().all()
    sentences = summary(found, few.evaluate, few.plans)
    assert sentences[0].startswith("At equal bytes") and "agree " not in " ".join(sentences)


def test_perplexity_alone_still_gives_a_table():
    alone = simulate(pool=2, slopes={})
    alone.responses = alone.responses[alone.responses["suite"] == "perplexity"]
    alone.evaluate = alone.evaluate[alone.evaluate["suite"] == "perplexity"]
    found = run(alone)
    assert set(found["analysis"]) == {"gain"}
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


def test_fisher_interval_holds_the_estimate_and_stays_inside():
    rho_R = np.clip(np.random.default_rng(0).normal(-0.85, 0.1, 500), -1, 1)
    lo, hi = fisher_interval(-0.9, rho_R)
    assert -1 < lo < -0.9 < hi < 0
    assert np.isnan(fisher_interval(np.nan, rho_R)).all()


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
    pd.testing.assert_frame_equal(found, run(results, FAST))
    responses = renamed(results.responses)
    first = responses[(responses["plan"] == "reference") & (responses["metric"] == "acc_norm,none")].index[0]
    other = results.responses.replace({"task": {"sums": "facts_held_out"}})  # a task of its own, whatever its name
    assert "facts_held_out" in set(analyze(results.plans, results.evaluate, other, settings=FAST, seed=0)["gold"])
    failed = analyze(results.plans, renamed(results.evaluate), responses.drop(first), settings=FAST, seed=0)
    assert one(failed, statistic="mcnemar_p", gold="facts", proxy="best", budget="2.6bpw")["n"] == 299
