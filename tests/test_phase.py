"""Rank versus bits: hulls, who wins where rank is planted to pay or not, controls paired and missing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc import tables
from bitalloc.errors import BitallocError
from bitalloc.option import Option
from bitalloc.phase import LEVELS, controls, hull, phase
from tests.simulated import simulate

SHAPES = {"k_proj": ("attention", 32, 64), "up_proj": ("mlp", 172, 64)}


def planted(attention: float, mlp: float, blocks: int = 4) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """SWEEP, SENSITIVITY, INVENTORY in which each rank divides the error of a kind by (1 + rank) to its exponent."""
    rng, rows, layers = np.random.default_rng(0), [], []
    for block in range(blocks):
        for role, (kind, outputs, inputs) in SHAPES.items():
            layer = f"{block}.{role}"
            layers.append({"layer": layer, "rows": outputs, "columns": inputs, "claimed": True, "kind": kind})
            for bits in (2, 3, 4):
                for group_size in (32, 64):
                    for rank in (0, 1, 2, 4):
                        option = Option("gptq", bits, group_size, rank)
                        decay = {"attention": attention, "mlp": mlp}[kind] * rng.uniform(0.9, 1.1)
                        rows.append({
                            "model": "m", "layer": layer, "kind": kind, "quantizer": "gptq", "bits": bits,
                            "group_size": group_size, "rank": rank, "nbytes": option.nbytes(outputs, inputs),
                            "rel_error": 2.0 ** (-2 * bits) * (group_size / 64) ** 0.3 * (1 + rank) ** -decay,
                        })  # fmt: skip
    frame = pd.DataFrame(layers)
    coefficient = rng.lognormal(0, 1, len(frame))
    return pd.DataFrame(rows), frame[["layer"]].assign(signal="kl", coefficient=coefficient), frame


def found(attention: float, mlp: float, plans: pd.DataFrame | None = None) -> pd.DataFrame:
    plans = pd.DataFrame(columns=["budget", "strategy"]) if plans is None else plans
    return phase(*planted(attention, mlp), plans, signal="kl", resamples=200, seed=0)


@given(data=st.data(), count=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_no_mixture_of_options_lies_below_the_hull(data, count):
    points = data.draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=count, max_size=count))
    nbytes, cost = np.array(points, dtype=float).T
    its = hull(nbytes, cost, [str(place) for place in range(count)])
    assert set(its.option_C) <= {str(place) for place in range(count)}
    assert (np.diff(its.nbytes_C) > 0).all() and (np.diff(its.cost_C) < 0).all()
    share = np.linspace(0, 1, 7)
    for i in range(count):
        for j in range(count):
            mixed = share * cost[i] + (1 - share) * cost[j]
            size = (share * nbytes[i] + (1 - share) * nbytes[j]).clip(nbytes.min(), nbytes.max())
            assert (its.cost(size) <= mixed + 1e-9).all()


def test_rank_wins_where_it_is_planted_to_pay_and_bits_where_it_is_not(tmp_path):
    frame = found(attention=1.2, mlp=0.02)
    tables.PHASE.write(frame, tmp_path / "phase.parquet")
    shapes = frame[frame["scope"] == "shape"].set_index(["name", "bits_per_weight"])
    rank, bits = shapes.loc["attention 32 x 64"], shapes.loc["mlp 172 x 64"]
    within = (LEVELS >= 2.7) & (LEVELS <= 3.1)
    assert set(rank.loc[LEVELS[within], "winner"]) == {"rank"} and set(bits.loc[LEVELS[within], "winner"]) == {"bits"}
    assert (bits["saved"].dropna() < 0.02).all()
    assert (rank.loc[LEVELS[within], "ratio"] < 1).all() and (bits.loc[LEVELS[within], "ratio"] > 1).all()
    assert (rank["saved_lo"].dropna() <= rank["saved"].dropna()).all()
    assert (rank["saved"].dropna() <= rank["saved_hi"].dropna()).all()
    assert (rank["width"] == 32).all() and (rank["n"] == 4).all()


def test_a_shape_sums_its_matrices_and_costs_bear_the_coefficients():
    frame = found(0.5, 0.5)
    grid = frame[frame["bits_per_weight"] == 3.0]
    matrices = grid[(grid["scope"] == "matrix") & (grid["kind"] == "mlp")]
    shape = grid[(grid["scope"] == "shape") & (grid["kind"] == "mlp")].iloc[0]
    for name in ("cost_bits_only", "cost_with_rank", "cost_joint"):
        assert shape[name] == pytest.approx(matrices[name].sum())
    assert shape["saved"] == pytest.approx(1 - shape["cost_joint"] / shape["cost_bits_only"])
    assert (frame["cost_joint"].dropna() <= frame["cost_bits_only"].dropna() * (1 + 1e-12)).all()


def test_nothing_is_extrapolated_and_equal_inputs_give_equal_tables():
    frame = found(0.5, 0.5)
    low, high = frame[frame["bits_per_weight"] < 2.2], frame[frame["bits_per_weight"] > 4.7]
    assert low["cost_bits_only"].isna().all() and set(low["winner"]) == {"out of reach"} and high.empty
    assert (frame.loc[frame["cost_with_rank"].isna(), "with_rank"] == "").all()
    pd.testing.assert_frame_equal(frame, found(0.5, 0.5))


def test_levels_of_the_budgets_stand_beside_the_grid_and_component_plans_are_none():
    plans = pd.DataFrame({
        "budget": ["2.8bpw", "2.8bpw", "component mlp"], "strategy": ["uniform", "optimal", "component"],
        "bits_per_weight": [2.7, 2.8, 9.0], "nbytes": [270, 280, 900], "budget_bytes": [280, 280, 900],
    })  # fmt: skip
    frame = found(0.5, 0.5, plans)
    named = frame[frame["budget"] != ""]
    assert set(named["budget"]) == {"2.8bpw"} and named["bits_per_weight"].to_numpy() == pytest.approx(2.8)
    both = frame[(frame["bits_per_weight"] - 2.8).abs() < 1e-9].groupby("name")["saved"]
    assert both.nunique().eq(1).all()


def test_a_sweep_without_rank_saves_nothing():
    sweep, sensitivity, inventory = planted(1, 1)
    plans = pd.DataFrame(columns=["budget", "strategy"])
    frame = phase(sweep[sweep["rank"] == 0], sensitivity, inventory, plans, signal="kl", resamples=20, seed=0)
    assert frame["saved"].dropna().eq(0).all() and frame["ratio"].isna().all()
    with pytest.raises(BitallocError, match="sensitivity by fisher differ"):
        phase(sweep, sensitivity, inventory, plans, signal="fisher", resamples=20, seed=0)


# ---- controls ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results():
    return simulate(pool=0, items=10)


def frames(plans: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {plan: pd.DataFrame({"layer": [plan], "bits": [3]}) for plan in plans["plan"]}


def test_controls_are_paired_window_by_window(results, tmp_path):
    found = controls(results.plans, results.responses, frames(results.plans), resamples=300, seed=0)
    tables.CONTROLS.write(found, tmp_path / "controls.parquet")
    assert len(found) == 3 * 2 * 2 * 2 and set(found["status"]) == {"ok"}
    nll = results.responses[results.responses["metric"] == "nll_nats_per_token"]
    by = nll[nll["task"] == "world/report"].groupby("plan")["value"].mean()
    row = found.query("budget == '2.6bpw' and control == 'rank_only' and task == 'world/report'")
    row = row.set_index("metric").loc["nll_nats_per_token"]
    assert row["value"] == pytest.approx(by["optimal-2.6bpw"] - by["rank_only-2.6bpw"])
    assert row["lo"] < row["value"] < row["hi"] < 0  # planted: optimal is better
    again = controls(results.plans, results.responses, frames(results.plans), resamples=300, seed=0)
    pd.testing.assert_frame_equal(found, again)


def test_a_control_that_is_missing_or_the_same_plan_says_so(results, tmp_path):
    plans = results.plans[results.plans["plan"] != "bits_only-2.6bpw"].copy()
    plans = plans[plans["plan"] != "bits_only-2.8bpw"]
    plans.loc[plans["plan"] == "optimal-2.6bpw", "note"] = "no bits_only: nothing to choose from; widen sweep options"
    same = frames(plans)
    same["rank_only-3.3bpw"] = same["optimal-3.3bpw"]
    found = controls(plans, results.responses, same, resamples=50, seed=0)
    tables.CONTROLS.write(found, tmp_path / "controls.parquet")
    status = found.groupby(["budget", "control"])["status"].first()
    assert status["2.6bpw", "bits_only"] == "no plan: nothing to choose from; widen sweep options"
    assert status["2.8bpw", "bits_only"] == "no plan: it is not in allocate.strategies"
    assert status["3.3bpw", "rank_only"] == "same plan" and status["2.6bpw", "rank_only"] == "ok"
    few = results.responses[(results.responses["plan"] != "optimal-3.3bpw") | (results.responses["item"] > 0)]
    with pytest.raises(BitallocError, match="cannot be paired"):
        controls(plans, few, same, resamples=50, seed=0)
