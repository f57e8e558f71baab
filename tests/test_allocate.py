"""From tables and budgets to plans: names, sizes, certificates, the choice of the best, and bad input."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc import tables
from bitalloc.allocate import (
    allocate,
    build,
    choose_best,
    choose_leaked,
    write_overrides,
)
from bitalloc.budget import budget_slug, limit, parse_budget, serving_nbytes
from bitalloc.config import Config, parse
from bitalloc.errors import BitallocError
from bitalloc.formats.layout import checkpoint_nbytes
from bitalloc.option import Option, options

SHAPES = {"q_proj": (128, 128), "k_proj": (64, 128), "up_proj": (384, 128), "down_proj": (128, 384)}
SWEEP = {"bits": [2, 3, 4], "group_sizes": [64, 32], "ranks": [0, 2, 4]}


def configured(**allocation) -> Config:
    return parse({"sweep": SWEEP, "allocate": {"budgets": ["2.8bpw"], "pool": 4, **allocation}})


def tensor(name: str, kind: str, shape: tuple[int, int], block: int, role: str = "") -> dict:
    return {
        "model": "m", "tensor": f"{name}.weight", "layer": name, "block": block, "role": role, "kind": kind,
        "site": f"{block}.{role}" if role else "", "rows": shape[0], "columns": shape[1], "dtype": "float16",
        "nbytes": 2 * shape[0] * shape[1], "tied": False, "claimed": bool(role), "reason": "" if role else "kept",
        "file": "model.safetensors", "digest": "",
    }  # fmt: skip


@dataclasses.dataclass
class Model:
    inventory: pd.DataFrame
    costs: pd.DataFrame
    sensitivity: pd.DataFrame

    def allocate(self, config: Config) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        return allocate(self.costs, self.sensitivity, self.inventory, config)


def model(seed: int = 0, blocks: int = 3, config: Config | None = None) -> Model:
    rng = np.random.default_rng(seed)
    config = config or configured()
    inventory, costs, sensitivity = [tensor("embed", "embedding", (500, 128), -1)], [], []
    for block in range(blocks):
        inventory.append(tensor(f"layers.{block}.norm", "norm", (128, 1), block))
        for role, shape in SHAPES.items():
            layer = f"layers.{block}.{role}"
            place = {"model": "m", "layer": layer, "block": block, "role": role, "kind": "mlp"}
            inventory.append(tensor(layer, "mlp", shape, block, role))
            for signal in ("kl", "fisher"):
                sensitivity.append(
                    {
                        **place,
                        "signal": signal,
                        "coefficient": float(rng.lognormal(0, 1.5)),
                        "kl_nats_per_token": 0.1,
                        "lo": 0.0,
                        "hi": 1.0,
                        "rel_error": 0.1,
                    }
                )
            for option in options(config.sweep):
                error = 2.0 ** (-2 * option.bits) * (option.group_size / 64) ** 0.3 * (1 + option.rank) ** -0.3
                costs.append(
                    {
                        **place,
                        **{name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")},
                        "nbytes": option.nbytes(*shape),
                        "rel_error": float(error * rng.lognormal(0, 0.05)),
                        "source": "measured",
                    }
                )
    return Model(pd.DataFrame(inventory), pd.DataFrame(costs), pd.DataFrame(sensitivity))


def weights(made: Model) -> int:
    claimed = made.inventory[made.inventory["claimed"]]
    return int((claimed["rows"] * claimed["columns"]).sum())


# ---- allocate ------------------------------------------------------------------------------------------
def test_plans_and_their_frames_fulfil_the_schemas(tmp_path):
    made = model()
    config = configured(budgets=["2.8bpw", "uniform 3b g32 r2", "300kB"])
    plans, frames = made.allocate(config)
    tables.PLANS.write(plans, tmp_path / "plans.parquet")
    for name, frame in frames.items():
        tables.PLAN.write(frame, tmp_path / f"{name}.parquet")
    assert list(plans["plan"]) == list(frames)
    for slug in ("2.8bpw", "uniform-3b-g32-r2", "300kB"):
        expected = ["uniform", "optimal", "bits_only", "rank_only", "manual", "greedy", "optimal_2", "optimal_3"]
        names = [f"{name}-{slug}" for name in expected] + [f"random-{slug}-{serial:03d}" for serial in range(4)]
        assert [name for name in frames if slug in name] == names


def test_anyone_can_recompute_the_rows_from_the_tables():
    made, config = model(1), configured(budgets=["2.7bpw", "3.1bpw"])
    plans, frames = made.allocate(config)
    coefficient = made.sensitivity.query("signal == 'kl'").set_index("layer")["coefficient"]
    for row in plans.itertuples():
        frame = frames[row.plan].merge(made.costs, on=["layer", "quantizer", "bits", "group_size", "rank"])
        assert len(frame) == 12
        cost = frame["layer"].map(coefficient) * frame["rel_error"]
        assert row.objective == pytest.approx(cost.sum(), rel=1e-12)
        assert np.allclose(frame["cost_nats_per_token"], cost, rtol=1e-12)
        assert row.nbytes == frame["nbytes_x"].sum() == frame["nbytes_y"].sum() <= row.budget_bytes
        assert row.bits_per_weight == pytest.approx(8 * row.nbytes / weights(made))
        assert row.checkpoint_nbytes == checkpoint_nbytes(made.inventory, frames[row.plan], config.sweep)
        assert row.lower_bound <= row.objective
        assert row.gap == pytest.approx(row.objective / row.lower_bound - 1, abs=1e-12)
    optimal = plans[plans["strategy"] == "optimal"]
    assert (optimal["gap"] < 1e-9).all()
    assert (plans["objective"] >= plans["budget"].map(optimal.set_index("budget")["objective"]) * (1 - 1e-12)).all()


def test_runners_up_and_pool_are_near_and_distinct():
    plans, frames = model(2, blocks=7).allocate(configured(pool=15, runners_up=3))
    assert len(frames) == 6 + 3 + 15
    distinct = {tuple(frame[["bits", "group_size", "rank"]].to_numpy().ravel()) for frame in frames.values()}
    assert len(distinct) >= 1 + 3 + 15
    runners = plans[plans["strategy"].str.fullmatch(r"optimal_\d")]
    assert list(runners["strategy"]) == ["optimal_2", "optimal_3", "optimal_4"]
    assert runners["objective"].is_monotonic_increasing and (runners["gap"] < 0.3).all()
    pool = plans[plans["strategy"] == "random"]
    assert len(pool) == 15
    assert (pool["nbytes"] >= 0.99 * pool["budget_bytes"]).all()


def test_repeatable_and_independent_of_the_other_budgets():
    made = model(3)
    alone, _ = made.allocate(configured(budgets=["3.1bpw"]))
    again, _ = made.allocate(configured(budgets=["2.7bpw", "3.1bpw"]))
    pd.testing.assert_frame_equal(alone, again[again["budget"] == "3.1bpw"].reset_index(drop=True))
    other, _ = made.allocate(configured(budgets=["3.1bpw"]).model_copy(update={"seed": 1}))
    assert list(other["objective"]) != list(alone["objective"])


def test_order_of_the_rows_does_not_matter():
    made = model(4)
    mixed = Model(made.inventory, made.costs.sample(frac=1, random_state=0), made.sensitivity[::-1])
    pd.testing.assert_frame_equal(made.allocate(configured())[0], mixed.allocate(configured())[0])


def test_the_signal_of_the_configuration_decides():
    made, config = model(5), configured(pool=0, runners_up=0)
    fisher = config.model_copy(update={"sensitivity": config.sensitivity.model_copy(update={"signal": "fisher"})})
    assert made.allocate(config)[0]["objective"][0] != made.allocate(fisher)[0]["objective"][0]


def test_uniform_plan_of_a_uniform_budget_is_that_option():
    plans, frames = model(6).allocate(configured(budgets=["uniform 3b g64 r4"], pool=0, runners_up=0))
    row = plans[plans["strategy"] == "uniform"].iloc[0]
    frame = frames["uniform-uniform-3b-g64-r4"]
    assert (frame[["bits", "group_size", "rank"]] == [3, 64, 4]).all(axis=None)
    assert row["nbytes"] == row["budget_bytes"]


def test_at_the_smallest_budget_there_is_one_plan():
    plans, frames = model(7).allocate(configured(budgets=["uniform 2b"], pool=5))
    assert plans["nbytes"].nunique() == 1 and (plans["gap"] == 0).all()
    assert [name for name in frames if name.startswith(("random", "optimal"))] == [
        "optimal-uniform-2b", "random-uniform-2b-000",
    ]  # fmt: skip


def test_a_matrix_with_fewer_options_and_the_pass_through():
    config = parse({"sweep": {**SWEEP, "bits": [2, 16]}, "allocate": {"budgets": ["9bpw"], "pool": 3}})
    made = model(8, config=config)
    made.costs = made.costs[~((made.costs["role"] == "k_proj") & (made.costs["rank"] > 2))]
    made.costs.loc[made.costs["quantizer"] == "none", "rel_error"] = 0.0
    plans, frames = made.allocate(config)
    for frame in frames.values():
        assert (frame.loc[frame["role"] == "k_proj", "rank"] <= 2).all()
    assert (frames["optimal-9bpw"]["quantizer"] == "none").any()
    assert (plans["nbytes"] <= plans["budget_bytes"]).all()


# ---- budgets -------------------------------------------------------------------------------------------
def budget_of(text: str, made: Model, config: Config):
    return parse_budget(text, build(made.costs, made.sensitivity, made.inventory, config), made.inventory, config.sweep)


def test_budgets_in_three_units():
    made, config = model(), configured()
    assert budget_of("2.6bpw", made, config).nbytes == int(2.6 * weights(made) / 8)
    uniform = sum(Option("gptq", 3, 64, 0).nbytes(*shape) for shape in SHAPES.values()) * 3
    assert budget_of("uniform 3b", made, config).nbytes == uniform
    rank = sum(Option("gptq", 3, 32, 4).nbytes(*shape) for shape in SHAPES.values()) * 3
    assert budget_of("uniform  3b g32 r4", made, config).nbytes == rank
    whole = budget_of("300 kB", made, config)
    assert whole.nbytes + whole.rest == 300_000
    assert [budget_slug(text) for text in ("uniform  3b g32 r4", "300 kB")] == ["uniform-3b-g32-r4", "300kB"]


@settings(deadline=None, max_examples=15)
@given(total=st.integers(281_000, 440_000))
def test_a_budget_for_the_whole_checkpoint_holds_to_the_byte(total):
    config = configured(budgets=[f"{total}B"], pool=2, runners_up=1)
    made = model(9, blocks=4)
    plans, _ = made.allocate(config)
    assert (plans["checkpoint_nbytes"] <= total).all()
    assert plans["checkpoint_nbytes"].max() > 0.95 * total


def test_a_card_that_also_serves_leaves_less_to_the_checkpoint():
    made = model(9, blocks=4)
    # keys of 64 rows in four blocks; 512 inputs and outputs of the widest matrix; logits of 500 words
    served = 2 * (2 * 100 * (4 * 64 + 512) + 4 * 500)
    assert serving_nbytes(made.inventory, 100, 2) == served
    total = 300_000
    assert limit(f"{total + served} context 100 batch 2", made.inventory) == limit(f"{total}B", made.inventory) == total
    assert limit("2.6bpw", made.inventory) is None and limit("uniform 3b", made.inventory) is None
    texts = [f"{total}B", f"{total + served}B context 100 batch 2"]
    plans, _ = made.allocate(configured(budgets=texts, pool=0))
    whole, serving = (plans[plans["budget"] == text].set_index("strategy") for text in texts)
    assert (whole["nbytes"] == serving["nbytes"]).all() and (whole["checkpoint_nbytes"] <= total).all()
    assert f"optimal-{total + served}B-context-100-batch-2" in set(plans["plan"])
    with pytest.raises(BitallocError, match="below the least possible"):
        made.allocate(configured(budgets=[f"{total}B context 100000"]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "2.6",
        "3 bits",
        "uniform",
        "uniform 3b r8 g64",
        "uniform 5b",
        "8XB",
        "-1GB",
        "8GB context",
        "8GB context 10 batch",
    ],
)
def test_what_cannot_be_read_or_reached_is_refused_in_one_line(text):
    with pytest.raises(BitallocError) as error:
        budget_of(text, model(), configured())
    assert "\n" not in str(error.value)
    assert text in str(error.value)


def test_unreachable_budgets_name_the_range():
    made, config = model(), configured()
    instance = build(made.costs, made.sensitivity, made.inventory, config)
    reach = rf"reachable: {instance.least:,} to {instance.most:,} bytes \(2\.281 to \d\.\d+ bits a weight\)"
    with pytest.raises(BitallocError, match=r"budget 2\.0bpw = [\d,]+ bytes is below the least possible; " + reach):
        budget_of("2.0bpw", made, config)
    with pytest.raises(BitallocError, match=r"budget 9bpw = [\d,]+ bytes is above the largest plan.*" + reach):
        budget_of("9bpw", made, config)
    with pytest.raises(
        BitallocError, match=r"budget 10kB = 10,000 bytes \([\d,]+ go to what is not claimed\) is below"
    ):
        budget_of("10kB", made, config)
    with pytest.raises(BitallocError, match=r"allocate\.budgets names '2\.8bpw' twice"):
        made.allocate(configured(budgets=["2.8bpw", "2.8 bpw"]))


def test_tables_that_do_not_fit_together_are_refused():
    made, config = model(), configured()
    with pytest.raises(BitallocError, match=r"costs and inventory differ in layers\.0\.q_proj"):
        allocate(made.costs[made.costs["layer"] != "layers.0.q_proj"], made.sensitivity, made.inventory, config)
    with pytest.raises(BitallocError, match=r"sensitivity by kl and inventory differ in layers\.0\.down_proj"):
        allocate(made.costs, made.sensitivity.query("signal != 'kl'"), made.inventory, config)
    with pytest.raises(BitallocError, match="differ in bytes"):
        allocate(made.costs.assign(nbytes=made.costs["nbytes"] + 1), made.sensitivity, made.inventory, config)
    broken = made.costs.assign(rel_error=made.costs["rel_error"].where(made.costs.index != 5))
    with pytest.raises(BitallocError, match=r"layers\.0\.q_proj at gptq-.* costs nan"):
        allocate(broken, made.sensitivity, made.inventory, config)
    with pytest.raises(BitallocError, match="did you mean 'manual'"):
        made.allocate(configured(strategies=["manul"]))


# ---- best and overrides --------------------------------------------------------------------------------
def scored(plans: pd.DataFrame, kl: dict[str, float], corpora: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    rows = [
        {
            "plan": plan,
            "suite": "divergence",
            "task": f"{corpus}/{split}",
            "metric": "kl_nats_per_token",
            "value": (value if split == "select" else 1 - value) * (1 + sign * 0.1),
        }
        for plan, value in kl.items()
        for split in ("select", "report")
        for corpus, sign in zip(corpora, (1, -1), strict=True)
    ]
    return pd.DataFrame(rows)


def test_best_is_the_winner_on_the_select_split():
    plans, frames = model().allocate(configured(budgets=["2.8bpw", "3.2bpw"]))
    kl = dict.fromkeys(plans["plan"], 0.001) | {
        "optimal-2.8bpw": 0.013, "optimal_2-2.8bpw": 0.0123, "optimal_3-2.8bpw": 0.02, "uniform-2.8bpw": 0.015,
        "optimal-3.2bpw": 0.013, "optimal_2-3.2bpw": 0.02, "optimal_3-3.2bpw": 0.02, "uniform-3.2bpw": 0.01,
    }  # fmt: skip
    rows, best = choose_best(plans, frames, scored(plans, kl))
    assert list(rows["plan"]) == list(best) == ["best-2.8bpw", "best-3.2bpw"]
    assert rows["note"][0] == "won by optimal_2 on the select split: KL 0.0123 (uniform 0.015)"
    assert rows["note"][1] == "won by uniform on the select split: KL 0.01 (uniform 0.01)"
    pd.testing.assert_frame_equal(best["best-2.8bpw"], frames["optimal_2-2.8bpw"])
    same = ["budget", "budget_bytes", "nbytes", "objective", "lower_bound", "checkpoint_nbytes"]
    assert (rows[same].iloc[0] == plans.set_index("plan")[same].loc["optimal_2-2.8bpw"]).all()
    assert set(rows["strategy"]) == {"best"}


def test_best_joins_the_plans_in_one_table(tmp_path):
    plans, frames = model().allocate(configured())
    rows, _ = choose_best(plans, frames, scored(plans, dict.fromkeys(plans["plan"], 0.1)))
    tables.PLANS.write(pd.concat([rows, plans], ignore_index=True), tmp_path / "plans.parquet")


@pytest.mark.parametrize("value", [None, np.nan])
def test_best_needs_a_score_of_every_candidate(value):
    plans, frames = model().allocate(configured())
    kl = dict.fromkeys(plans["plan"], 0.1)
    kl.pop("uniform-2.8bpw") if value is None else kl.update({"uniform-2.8bpw": value})
    with pytest.raises(BitallocError, match=r"uniform-2\.8bpw has no divergence"):
        choose_best(plans, frames, scored(plans, kl))


# ---- the arms of the analysis, and controls that cannot be -----------------------------------------------
def halves(made: Model) -> Model:
    """The model with its first two roles as attention."""
    first = {"q_proj", "k_proj"}
    parts = (
        frame.assign(kind=frame["kind"].mask(frame["role"].isin(first), "attention"))
        for frame in (made.inventory, made.costs, made.sensitivity)
    )
    return Model(*parts)


def test_component_plans_are_at_no_budget_and_disturb_nobody(tmp_path):
    made = halves(model())
    plain, _ = made.allocate(configured())
    plans, frames = made.allocate(configured(arms=["component"]))
    tables.PLANS.write(plans, tmp_path / "plans.parquet")
    pd.testing.assert_frame_equal(tables.without_arms(plans), plain)
    arm = plans[plans["strategy"] == "component"]
    assert list(dict.fromkeys(arm["budget"])) == ["component attention", "component mlp"]
    for budget, group in arm.groupby("budget"):
        kind = budget.removeprefix("component ")
        assert list(group["plan"]) == [f"component-{kind}-{step}" for step in range(1, len(group) + 1)]
        assert group["objective"].is_monotonic_increasing and (group["objective"] > 0).all()
        for row in group.itertuples():
            frame = frames[row.plan].merge(made.inventory[["layer", "kind"]])
            tables.PLAN.write(frames[row.plan], tmp_path / "plan.parquet")
            assert set(frame.loc[frame["kind"] != kind, "bits"]) == {16}
            assert frame.loc[frame["kind"] == kind, "bits"].max() < 16
            assert row.nbytes == row.budget_bytes == frame["nbytes"].sum()
            assert frame["cost_nats_per_token"].sum() == pytest.approx(row.objective)
    pd.testing.assert_frame_equal(plans, made.allocate(configured(arms=["component"]))[0])


def test_rules_and_maps_of_the_user_are_plans_at_no_budget(tmp_path):
    made = model(blocks=4)
    file = tmp_path / "mine.json"
    file.write_text('{"wte": "int8", "h.1-h.2": "int4", "default": "fp16"}')
    plain, _ = made.allocate(configured())
    plans, frames = made.allocate(configured(rules=["early", "all_low", "all_high"], plans=[str(file)]))
    tables.PLANS.write(plans, tmp_path / "plans.parquet")
    free = plans.iloc[len(plain) :].set_index("plan")
    pd.testing.assert_frame_equal(tables.without_arms(plans), plain)
    assert list(free.index) == ["position-early", "position-all_low", "position-all_high", "mine"]
    for name, row in free.iterrows():
        tables.PLAN.write(frames[name], tmp_path / "plan.parquet")
        assert row["nbytes"] == frames[name]["nbytes"].sum() and pd.isna(row["objective"])
        assert row["checkpoint_nbytes"] == checkpoint_nbytes(made.inventory, frames[name], configured().sweep)
        assert yaml.safe_load(write_overrides(frames[name], {"plan": name} | row.to_dict()))
    nbytes = free["nbytes"]
    assert nbytes["position-all_low"] < nbytes["position-early"]
    bits = frames["mine"].set_index("layer")["bits"]
    assert bits["embed"] == 8 and bits["layers.0.q_proj"] == 16 and bits["layers.2.down_proj"] == 4
    assert "embed" not in set(frames["position-all_high"]["layer"])  # as it is stored
    assert "h.1 fp16" in free["note"]["position-early"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"h.9.mlp": "int8"}', "names block 9, the model has h.0 to h.3"),
        ('{"wte": "int7"}', "unknown precision 'int7'"),
    ],
)
def test_a_map_that_does_not_fit_is_one_line_with_its_file(tmp_path, text, said):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(BitallocError, match=said) as error:
        model(blocks=4).allocate(configured(plans=[str(file)]))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_two_maps_of_one_name_are_refused(tmp_path):
    files = [tmp_path / folder / "mine.json" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("{}")
    with pytest.raises(BitallocError, match="two plans are named mine"):
        model(blocks=4).allocate(configured(plans=[str(file) for file in files]))


def leaking(made: Model) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Plans with candidates of the arm, whose coefficients run the other way."""
    coefficient = made.sensitivity["coefficient"].to_numpy()
    seen = made.sensitivity.assign(coefficient=coefficient[::-1])
    return allocate(made.costs, made.sensitivity, made.inventory, configured(arms=["leaked"]), leaked=seen)


def test_leaked_candidates_are_as_many_as_those_of_best_and_fit():
    made = model()
    plans, _ = leaking(made)
    leaked = plans[plans["strategy"].str.fullmatch(r"leaked_\d+")]
    assert list(leaked["plan"]) == ["leaked_1-2.8bpw", "leaked_2-2.8bpw", "leaked_3-2.8bpw"]
    assert (leaked["nbytes"] <= leaked["budget_bytes"]).all()
    # told in the costs of all other plans, where no plan can be better than the optimum
    assert (leaked["objective"] >= leaked["lower_bound"]).all() and leaked["gap"].iloc[0] > 0.05
    pd.testing.assert_frame_equal(plans, leaking(made)[0])


def test_leaked_is_the_winner_by_loss_on_the_report_split():
    plans, frames = leaking(model())
    nll = dict.fromkeys(plans["plan"], 0.1) | {"leaked_2-2.8bpw": 0.9}  # `scored` turns them on the report split
    scores = scored(plans, nll).assign(suite="perplexity", metric="nll_nats_per_token")
    rows, chosen = choose_leaked(plans, frames, scores)
    assert list(rows["plan"]) == list(chosen) == ["leaked-2.8bpw"]
    assert rows["note"][0] == "won by leaked_2 on the report split: NLL 0.1 (uniform 0.9)"
    pd.testing.assert_frame_equal(chosen["leaked-2.8bpw"], frames["leaked_2-2.8bpw"])
    honest = scores.assign(value=scores["value"].mask(scores["plan"] == "optimal_3-2.8bpw", 0.01))
    assert "won by optimal_3 " in choose_leaked(plans, frames, honest)[0]["note"][0]
    with pytest.raises(BitallocError, match=r"leaked_1-2\.8bpw has no perplexity"):
        choose_leaked(plans, frames, scores[scores["plan"] != "leaked_1-2.8bpw"])


def test_a_control_that_the_options_do_not_allow_leaves_its_reason():
    config = parse({"sweep": SWEEP | {"ranks": [2, 4]}, "allocate": {"budgets": ["2.9bpw"], "pool": 0}})
    plans, frames = model(config=config).allocate(config)
    assert "bits_only-2.9bpw" not in frames
    note = plans.set_index("plan").loc["optimal-2.9bpw", "note"]
    assert note.startswith("no bits_only: nothing to choose from")


def test_plans_of_the_arms_are_never_shipped():
    with pytest.raises(BitallocError, match="leaked plans serve the analysis alone"):
        parse({"compress": {"plans": ["best", "leaked"]}})


def test_overrides_are_yaml_with_the_summary_above():
    plans, frames = model().allocate(configured())
    text = write_overrides(
        frames["optimal-2.8bpw"], plans.set_index("plan", drop=False).loc["optimal-2.8bpw"].to_dict()
    )
    read = yaml.safe_load(text)
    frame = frames["optimal-2.8bpw"].set_index("layer")
    assert list(read) == list(frame.index)
    for layer, option in read.items():
        assert option == frame.loc[layer, ["quantizer", "bits", "group_size", "rank"]].to_dict()
    assert "# plan: optimal-2.8bpw\n" in text and "# budget: 2.8bpw\n" in text and "# note" not in text


def test_fused_groups_take_one_option_and_the_price_is_told():
    config = configured(fuse=["qkv"], pool=0)
    here = model(config=config)
    plans, frames = here.allocate(config)
    free, _ = here.allocate(configured(pool=0))
    for name, frame in frames.items():
        joint = frame[frame["role"].isin(["q_proj", "k_proj"])].groupby("block")
        chosen = joint[["quantizer", "bits", "group_size", "rank"]].nunique().max().max()
        assert chosen == 1 or name.startswith("unfused")
    at = plans.set_index("strategy")
    assert at.loc["unfused", "objective"] == free.set_index("strategy").loc["optimal", "objective"]
    assert at.loc["unfused", "objective"] < at.loc["optimal", "objective"] == at.loc["optimal", "lower_bound"]
    lower = 100 * (1 - at.loc["unfused", "objective"] / at.loc["optimal", "objective"])
    assert at.loc["unfused", "note"] == f"optimal without fusing qkv: predicted cost {lower:.1f} % lower"
    for row in plans.itertuples():
        assert row.nbytes == frames[row.plan]["nbytes"].sum() <= row.budget_bytes
        assert row.objective == pytest.approx(frames[row.plan]["cost_nats_per_token"].sum())


def test_what_servers_load_is_fused_by_default():
    assert configured().fuse == []
    exported = parse({"export": {"formats": ["huggingface"]}})
    assert exported.fuse == ["qkv", "gate_up"]
    assert parse({"export": {"formats": ["huggingface"]}, "allocate": {"fuse": []}}).fuse == []
    with pytest.raises(BitallocError, match=r"allocate\.fuse.*'qkv' or 'gate_up'.*'qk'"):
        configured(fuse=["qk"])


# ---- languages -------------------------------------------------------------------------------------------
def spoken(made: Model, *, floors=()) -> pd.DataFrame:
    """LANGUAGES in which every language has matrices of its own that it suffers by."""
    claimed = made.inventory[made.inventory["claimed"]]
    rows = []
    for n, language in enumerate(("en", "he", "ar")):
        for place, layer in enumerate(claimed["layer"]):
            own = {"coefficient": 10.0 if place % 3 == n else 0.1, "reference_nll_nats_per_token": 2.0}
            own |= {"signal": "kl", "floor": language in floors}
            rows.append({"model": "m", "layer": layer, "language": language, **own})
    return pd.DataFrame(rows)


def lost(made: Model, frame: pd.DataFrame, languages: pd.DataFrame) -> dict[str, float]:
    """Predicted relative damage of a plan, recomputed from the tables."""
    place = ["layer", "quantizer", "bits", "group_size", "rank"]
    chosen = frame[place].merge(made.costs, on=place)
    joined = languages.merge(chosen[["layer", "rel_error"]], on="layer")
    damage = joined["coefficient"] * joined["rel_error"] / joined["reference_nll_nats_per_token"]
    return damage.groupby(joined["language"]).sum().to_dict()


def test_the_fair_plan_spares_the_worst_off_and_keeps_to_the_margin_of_english():
    made = model(blocks=4)
    languages, names = spoken(made), ["optimal", "fair", "english"]
    config = configured(strategies=names, pool=0, runners_up=0)
    plans, frames = allocate(made.costs, made.sensitivity, made.inventory, config, languages=languages)
    assert (plans["nbytes"] <= plans["budget_bytes"]).all()
    damage = {name: lost(made, frames[f"{name}-2.8bpw"], languages) for name in names}
    assert max(damage["fair"].values()) < max(damage["optimal"].values())
    assert max(damage["fair"].values()) < max(damage["english"].values())
    assert damage["english"]["en"] == min(each["en"] for each in damage.values())
    assert damage["fair"]["en"] <= damage["optimal"]["en"] + config.fairness.margin_en
    worst = max(damage["fair"].values())
    assert f"predicted to lose {worst:.3g} of its NLL" in plans.set_index("strategy").at["fair", "note"]


def test_languages_at_their_floor_have_no_say():
    made = model(blocks=4)
    config = configured(strategies=["fair", "optimal"], pool=0, runners_up=0)
    _, frames = allocate(
        made.costs, made.sensitivity, made.inventory, config, languages=spoken(made, floors=["en", "ar"])
    )
    _, alone = allocate(
        made.costs, made.sensitivity, made.inventory, config, languages=spoken(made).query("language == 'he'")
    )
    pd.testing.assert_frame_equal(frames["fair-2.8bpw"], alone["fair-2.8bpw"])


@pytest.mark.parametrize(
    ("floors", "names", "told"),
    [
        (None, ["fair"], "needs LANGUAGES"),
        (["en", "he", "ar"], ["fair"], "in no language"),
        (["en"], ["english"], "needs en among fairness.languages"),
    ],
)
def test_what_cannot_be_fair_is_one_line(floors, names, told):
    made = model(blocks=4)
    languages = None if floors is None else spoken(made, floors=floors)
    with pytest.raises(BitallocError, match=told):
        allocate(made.costs, made.sensitivity, made.inventory, configured(strategies=names), languages=languages)
