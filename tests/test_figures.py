import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.image import imread

from bitalloc import figures, tables
from bitalloc.analyze import analyze, headline
from bitalloc.config import Analyze
from bitalloc.figures.domains import _Data
from bitalloc.figures.phase import sentence
from bitalloc.figures.style import mark, spread
from bitalloc.phase import controls, phase
from tests.planted import WORLDS, planted
from tests.simulated import empty, gates, law, residuals, sensitivity, simulate, sweep

STAMP = figures.stamp(gates())


def draw(results, path, sentence=None, found=None):
    found = gains(results) if found is None else found
    sentence = sentence or headline(found, results.evaluate, results.plans, gates())
    figures.goodhart(results.plans, results.evaluate, found, sentence, path, STAMP, model="simulated")


def drawn(path, width):
    """A PNG of `width` inches that is not blank and whose right and left borders are free of ink."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] == round(width * 160)
    assert 0.01 < (pixels.mean(2) < 0.9).mean() < 0.6
    assert pixels[:, :6].min() == 1 and pixels[:, -6:].min() == 1, "something is cut off at the border"
    return pixels


def test_goodhart_is_drawn_and_its_bytes_repeat(tmp_path):
    results = simulate(pool=8, items=80, slopes={"facts": 12.0}, corpora=("world",))
    found = gains(results)
    draw(results, tmp_path / "a.png", found=found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rcParams, "font.size", 20.0)  # the user's own settings must not matter
        draw(results, tmp_path / "b.png", found=found)
    drawn(tmp_path / "a.png", 13.5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": 0, "strategies": ("uniform", "optimal"), "slopes": {}},
        {"pool": 0, "strategies": ("uniform",), "budgets": ("3.3bpw",), "corpora": ("world",)},
        {"pool": 4, "slopes": {"facts": 12.0, "sums": 1.0}, "level": {"facts": -3.0, "sums": 14.0}},
    ],
    ids=["few plans, no tasks", "one plan a budget", "floor and saturated"],
)
def test_goodhart_degrades_gracefully(tmp_path, settings):
    draw(simulate(items=60, **settings), tmp_path / "figure.png")
    drawn(tmp_path / "figure.png", 13.5)


def test_goodhart_names_every_kind_of_failure(tmp_path):
    draw(planted(WORLDS["known"], 0, pool=8, items=60).results, tmp_path / "figure.png")
    drawn(tmp_path / "figure.png", 13.5)


def test_goodhart_with_perplexity_alone(tmp_path):
    alone = simulate(pool=2, slopes={})
    alone.responses = alone.responses[alone.responses["suite"] == "perplexity"]
    alone.evaluate = alone.evaluate[alone.evaluate["suite"] == "perplexity"]
    draw(alone, tmp_path / "figure.png")
    drawn(tmp_path / "figure.png", 13.5)


def test_a_longer_sentence_never_leaves_the_page(tmp_path):
    few = {"slopes": {"facts": 12.0}, "budgets": ("2.6bpw",)}
    draw(simulate(pool=0, items=40, **few), tmp_path / "figure.png", "A long word here and there, " * 14)
    drawn(tmp_path / "figure.png", 13.5)


def gains(results):
    settings = Analyze(resamples=20, folds=2)
    return analyze(results.plans, results.evaluate, results.responses, settings=settings, seed=0)


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({}, ["best", "bits_only", "greedy"]),
        ({"corpora": ("world",)}, ["best"]),
        ({"strategies": ("uniform",), "budgets": ("3.3bpw",)}, ["uniform"]),
    ],
)
def test_domains(tmp_path, settings, written):
    results = simulate(pool=2, items=20, **settings)
    checkpoints = results.plans[results.plans["strategy"].isin(written)]
    figures.domains(
        results.plans, checkpoints, gains(results), ["world"], tmp_path / "domains.png", STAMP, model="simulated"
    )
    drawn(tmp_path / "domains.png", 13.5)


def test_phase(tmp_path):
    results, swept = simulate(pool=0, items=10), sweep(blocks=2)
    inventory = swept.drop_duplicates("layer").assign(rows=128, columns=128, claimed=True)
    found = phase(swept, sensitivity(), inventory, results.plans, signal="kl", resamples=20, seed=0)
    frames = {plan: found.head(place) for place, plan in enumerate(results.plans["plan"])}
    compared = controls(results.plans, results.responses, frames, resamples=20, seed=0)
    alone = compared.iloc[:0]
    for name, paired in (("a", compared), ("b", compared), ("unpaired", alone)):
        figures.phase(found, paired, tmp_path / f"{name}.png", STAMP, model="simulated")
    drawn(tmp_path / "a.png", 13.5)
    drawn(tmp_path / "unpaired.png", 13.5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_headline_of_phase_claims_a_gain_only_where_nothing_speaks_against_it():
    matrices = {"name": ["a", "b", "c"], "winner": ["rank", "bits", "open"]}
    frame = pd.DataFrame({"scope": "matrix", "budget": "3bpw", **matrices})
    case = {"control": "bits_only", "metric": "kl_nats_per_token", "value": 0.0}
    even, won, lost = (case | {"lo": lo, "hi": hi} for lo, hi in ((-1.0, 1.0), (-2.0, -1.0), (1.0, 2.0)))
    said = "rank is predicted to save 2 % of KL or more in 1 of 3 matrices at 3bpw"
    assert sentence(frame, pd.DataFrame([even])) == (
        "No consistent gain from rank at equal bytes: measured KL with it is below that of bits alone in 0 of 1 cases, "
        f"above in 0; {said}"
    )
    for cases, opening in (
        ([even, won], "Rank pays"), ([won, won, lost], "No consistent gain"), ([even, even, won], "No consistent gain"),
        ([won, lost, lost], "No consistent gain"), ([even, lost], "Rank costs"), ([even] * 2 + [lost], "No consistent"),
    ):  # fmt: skip
        assert sentence(frame, pd.DataFrame(cases)).startswith(opening)
    assert sentence(frame, pd.DataFrame(columns=list(even))) == said[0].upper() + said[1:]


def test_the_headline_of_domains_counts_whole_intervals_and_tells_calibrated_text_apart():
    results = simulate(pool=0, items=20)
    found = gains(results)
    rows = found["statistic"] == "ppl_gain_percent"
    found.loc[rows, ["value", "lo", "hi"]] = (3.0, 1.0, 5.0)  # a gain: PPL is lower
    worse = rows & (found["gold"] == "ppl:docstrings") & (found["budget"] == "2.6bpw")
    found.loc[worse, ["value", "lo", "hi"]] = (-3.0, -5.0, -1.0)
    unsure = rows & (found["gold"] == "ppl:docstrings") & (found["budget"] == "2.8bpw")
    found.loc[unsure, ["value", "lo", "hi"]] = (1.0, -1.0, 3.0)
    best = results.plans[results.plans["strategy"] == "best"]

    def sentence(calibrated):
        return _Data(results.plans, best, found, calibrated).sentence()

    assert sentence(["world"]) == (
        "PPL of best against uniform is lower in 3 of 3 cases on calibrated text, "
        "and in 1 of 3 cases (higher in 1) on other text"
    )
    assert sentence(["docstrings_train"]).endswith(
        "(higher in 1) on calibrated text, and in 3 of 3 cases on other text"
    )
    assert sentence(["a"]) == "PPL of best against uniform is lower in 4 of 6 cases (higher in 1) on other text"
    lead = _Data(results.plans, best, found, ["world"]).lead.loc[("best", "2.6bpw", "world")]
    assert lead.to_dict() == {"value": -3.0, "lo": -5.0, "hi": -1.0}


@pytest.mark.parametrize("blocks", [4, 32])
def test_maps_of_the_model(tmp_path, blocks):
    errors = sweep(blocks)
    figures.sensitivity(sensitivity(blocks), tmp_path / "sensitivity.png", STAMP)
    figures.errors(errors, tmp_path / "errors.png", STAMP)
    plan = errors.groupby("layer", sort=False).sample(1, random_state=0).assign(cost_nats_per_token=0.0)
    figures.plan(plan[tables.PLAN.names], "optimal-2.6bpw", tmp_path / "plan.png", STAMP)
    for name, width in (("sensitivity", 13.5), ("errors", 13.5), ("plan", 9)):
        drawn(tmp_path / f"{name}.png", width)


def test_sensitivity_without_intervals_and_with_a_zero(tmp_path):
    frame = sensitivity().query("signal == 'fisher'").assign(lo=None, hi=None)
    frame.loc[frame.index[0], "coefficient"] = 0.0
    figures.sensitivity(frame, tmp_path / "sensitivity.png", STAMP)
    drawn(tmp_path / "sensitivity.png", 13.5)


def test_law(tmp_path):
    figures.law(residuals(), law(), "multiplicative", tmp_path / "law.png", STAMP)
    drawn(tmp_path / "law.png", 13.5)


def test_the_stamp_names_every_no_go():
    assert STAMP.startswith("Gates: 4 of 6 GO")
    assert "NO-GO r2_rank 0.41 (must be > 0.5; fallback)" in STAMP and "manual_gain" in STAMP
    assert "NO-GO r2_rank nan" in figures.stamp(gates().query("check == 'r2_rank'").assign(value=None))
    assert figures.stamp(empty(tables.GATES, [])) == "Gates: 0 of 0 GO"


def test_labels_are_spread_in_order_and_stay_inside():
    wanted = [0.02, 0.021, 0.5, 0.99, 0.995, 1.0]
    places = spread(wanted, 0.06, 0.02, 0.98)
    assert (np.diff(places) >= 0.06 - 1e-9).all() and places.min() >= 0.02 and places.max() <= 0.98
    assert places[2] == pytest.approx(0.5)


def test_every_strategy_has_its_own_shape():
    shapes = [mark(name).marker for name in ("uniform", "optimal", "bits_only", "rank_only", "manual", "greedy")]
    assert len(set(shapes)) == len(shapes)
    assert mark("evolve") == mark("evolve") and mark("evolve").label == "evolve"
