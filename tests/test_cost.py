"""The estimate of an evaluation, its ceiling, and the plan of it from the configuration alone."""

from pathlib import Path

import pytest

from bitalloc import config, cost
from bitalloc.cost import NAMED, POOL, Work
from bitalloc.errors import BitallocError
from bitalloc.statistics import detectable_points
from bitalloc.tables import COST

ROOT = Path(__file__).parents[1]
SHEET = [ROOT / "config/config.yaml", ROOT / "config/models.yaml"]


def works(plans, items=10, windows=3600, role=POOL):
    return [(role, work) for _ in range(plans) for work in (
        Work("windows", "a/report", 4, windows), Work("world", "facts", items, 720 * items)
    )]  # fmt: skip


def table(pool=10, named=2, **sizes):
    return cost.estimate(works(named, role=NAMED) + works(pool, **sizes), {False: 1.0, True: 1.0})


@pytest.mark.parametrize("points", [1.5, 2.9, 5, 20])
@pytest.mark.parametrize("q", [0.02, 0.1, 1.0])
def test_as_many_items_as_the_power_takes_and_no_more(points, q):
    n = cost.needed(points, q)
    assert detectable_points(q, n) <= points + 1e-9 < detectable_points(q, n - 1)


def test_the_table_counts_plans_items_and_tokens_and_leaves_out_what_is_stored(tmp_path):
    half = Work("downstream", "gsm8k", 5, 7200, stored=3600, writes=True)
    frozen = Work("weights", "recomputed", 7, seconds=1800)
    frame = cost.estimate([*works(3), (POOL, half), (NAMED, frozen)], {False: 1.0, True: 0.5})
    COST.write(frame, tmp_path / "cost.parquet")
    rows = frame.set_index(["suite", "task", "role"])
    assert rows.loc[("world", "facts", POOL), ["plans", "items", "tokens", "hours"]].tolist() == [3, 30, 21600, 6]
    assert rows.loc[("downstream", "gsm8k", POOL), ["stored_tokens", "hours"]].tolist() == [3600, 2]
    assert rows.loc[("weights", "recomputed", NAMED), "hours"] == 0.5
    block = cost.told(frame).splitlines()
    assert block[-1].split() == ["all", "39,600", "9%", "11.5"]
    assert len(block) == len(frame) + 2


def test_above_the_ceiling_it_is_said_what_would_fit():
    frame = table()  # named: 2 x (1 + 2) hours; pool: 10 x (1 + 2)
    cost.check(frame, ceiling_hours=36, points=5)
    cost.check(frame, ceiling_hours=None, points=5)
    for ceiling, told in (
        (26, ["take 36 hours, evaluate.ceiling_hours is 26", "6 random plans in all instead of 10 (allocate.pool)",
              "evaluate.pool_points: 7.1 instead of 5"]),
        (10, ["1 random plans in all"]),
        (3, ["50% of the windows and items of the named plans, and no pool"]),
    ):  # fmt: skip
        with pytest.raises(BitallocError) as caught:
            cost.check(frame, ceiling_hours=ceiling, points=5)
        assert all(part in str(caught.value) for part in told), str(caught.value)
        assert "\n" not in str(caught.value)
    # what is said to fit does fit
    cost.check(table(pool=6), ceiling_hours=26, points=5)
    fewer = 10 * cost.needed(7.1, 0.1) / cost.needed(5, 0.1)
    cost.check(table(items=fewer), ceiling_hours=26, points=7.1)


def test_a_7b_is_planned_without_weights_and_fits_into_a_day():
    settings = config.load(*SHEET).for_model("qwen2_7b")
    frame, basis = cost.plan(settings, 7.6e9)
    assert "nothing was measured" in basis
    assert frame["hours"].sum() < settings.evaluate.ceiling_hours == 24
    counts = frame.set_index("role")[["plans", "tokens"]]
    assert counts.loc[POOL].tolist() == [180, 180 * 64 * 2048]
    assert counts.loc[NAMED, "plans"] == 2 + 3 * 7  # reference twice; six strategies and best at three budgets
    seven = "mmlu gsm8k hellaswag arc_challenge piqa winogrande lambada_openai".split()
    whole = {name: {"limit": 2000 if name == "hellaswag" else None} for name in seven}
    whole = {"evaluate": {"suites": ["perplexity", "downstream"], "tasks": whole}}
    frame, _ = cost.plan(config.load(*SHEET, overrides=whole).for_model("qwen2_7b"), 7.6e9)
    cost.check(frame, ceiling_hours=24, points=9)
    tasks = {"evaluate": {"suites": ["downstream"], "tasks": {"mmlu": {"limit": 20}, "gsm8k": {}}}}
    frame, _ = cost.plan(config.load(*SHEET, overrides=tasks).for_model("qwen2_7b"), 7.6e9)
    items = frame.set_index(["task", "role"])["items"]
    assert (items["mmlu", NAMED], items["mmlu", POOL]) == (23 * 20 * 57, 180 * cost.needed(9, 0.1))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gpt2"], "the name gpt2 does not tell how large the model is: add --parameters 7.6e9"),
        (["qwen2_7"], "unknown model 'qwen2_7': did you mean 'qwen2_7b'"),
        (["gpt2", "--parameters", "-1"], "is no number of parameters"),
        (["qwen2_7b", "--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line(arguments, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BitallocError, match=told):
        cost.main(arguments)


def test_the_command_prints_the_estimate(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cost.main(["qwen2_1_5b"])
    said = capsys.readouterr().out
    assert said.startswith("qwen2_1_5b: arithmetic for 1.5e+09 parameters")
    assert "windows  wikitext2/report  named" in said


@pytest.mark.parametrize(
    ("key", "value"), [("ceiling_hours", "a day"), ("ceiling_hours", -1), ("pool_points", -5), ("pool_discordant", 0)]
)
def test_settings_out_of_range_are_one_line(key, value):
    with pytest.raises(BitallocError, match=rf"configuration: evaluate\.{key}: Input should be .* \(got '?{value}"):
        config.parse({"evaluate": {key: value}})
