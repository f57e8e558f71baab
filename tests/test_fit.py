"""Planted laws are recovered, each form wins on its own data, and predictions stay between measurements."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from bitalloc import tables
from bitalloc.config import Fit, Sweep
from bitalloc.errors import BitallocError
from bitalloc.fit import DECAY, FORMS, costs, law, residuals
from bitalloc.option import Option

ROLES = {"q_proj": "attention", "o_proj": "attention", "up_proj": "mlp", "down_proj": "mlp"}
BITS, GROUPS, RANKS = (2, 3, 4), (32, 64), (0, 2, 4, 8)
BETA, GAMMA, DELTA, KAPPA, FACTOR = 2.1, 0.02, 0.5, 0.12, 1.25
QUICK = Fit(resamples=40)


def planted(form, *, blocks=6, bits=BITS, groups=GROUPS, ranks=RANKS, noise=0.02, seed=0, decay=None):
    """A SWEEP frame drawn from a law; `decay` gives a matrix's own decay with rank by its kind."""
    rng, noises = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    rows = []
    for block in range(blocks):
        for role, kind in ROLES.items():
            scale, own = np.exp(rng.normal()), rng.uniform(0.7, 1.3)
            for group in groups:
                for b in bits:
                    for rank in ranks:
                        steep = decay[kind] if decay else own * (KAPPA if form == "exponential" else DELTA)
                        shape = {
                            "additive": 2.0 ** (-BETA * b) + GAMMA * (rank + 1.0) ** -DELTA,
                            "multiplicative": 2.0 ** (-BETA * b) * (rank + 1.0) ** -steep,
                            "exponential": 2.0 ** (-BETA * b) * np.exp(-steep * rank),
                        }[form]
                        factor = FACTOR if group == groups[-1] and len(groups) > 1 else 1.0
                        rows.append(
                            {
                                "layer": f"blocks.{block}.{role}", "block": block, "role": role, "kind": kind,
                                "bits": b, "group_size": group, "rank": rank,
                                "rel_error": scale * factor * shape * np.exp(noise * noises.normal()),
                            }
                        )  # fmt: skip
    rest = {"model": "m", "site": "s", "quantizer": "gptq", "nbytes": 1, "mse": 0.1, "nmse": 0.1}
    rest |= {"weight_energy_ratio": 1.0, "key": "k", "wall_s": 0.0}
    return pd.DataFrame(rows).assign(**rest)[tables.SWEEP.names]


def inventory(sweep, rows=128, columns=64):
    return sweep.drop_duplicates("layer")[["layer"]].assign(rows=rows, columns=columns, claimed=True)


@functools.cache
def fitted(form):
    return law(planted(form), settings=QUICK, seed=0)


def row(frame, form, statistic, scope="pooled"):
    found = frame[(frame["form"] == form) & (frame["scope"] == scope) & (frame["statistic"] == statistic)]
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize("form", DECAY)
def test_each_form_wins_on_data_drawn_from_it_and_its_parameters_lie_in_their_intervals(form):
    found = fitted(form)
    goodness = {other: row(found, other, "r2_loo")["value"] for other in DECAY}
    assert max(goodness, key=goodness.get) == form
    assert goodness[form] > 0.99
    assert row(found, form, "r2_rank")["value"] > 0.9
    beta, factor = row(found, form, "beta"), row(found, form, "factor_gptq_g64")
    assert beta["lo"] - 0.01 < BETA < beta["hi"] + 0.01
    assert factor["lo"] - 0.005 < FACTOR < factor["hi"] + 0.005
    decay = row(found, form, DECAY[form])
    assert decay["lo"] <= decay["value"] <= decay["hi"]
    assert decay["value"] == pytest.approx(KAPPA if form == "exponential" else DELTA, rel=0.15)
    assert row(found, form, "beta")["n"] == 24
    if form == "additive":
        assert row(found, form, "gamma")["value"] == pytest.approx(GAMMA, rel=0.1)


def test_the_additive_law_passes_r2_and_still_gets_rank_wrong_on_multiplicative_data():
    found = fitted("multiplicative")
    assert row(found, "additive", "r2_log")["value"] > 0.9
    assert row(found, "additive", "r2_rank")["value"] < 0
    assert row(found, "multiplicative", "r2_rank")["value"] > 0.95


def test_the_table_keeps_its_schema_and_covers_every_form_and_scope(tmp_path):
    found = fitted("multiplicative")
    tables.LAW.write(found, tmp_path / "law.parquet")
    scopes = {"pooled", "attention", "mlp", "early", "middle", "late"}
    layers = set(planted("multiplicative")["layer"])
    for form in FORMS:
        assert scopes | layers <= set(found.loc[found["form"] == form, "scope"])
    own = row(found, "multiplicative", "delta", scope="blocks.3.up_proj")
    assert 0.3 < own["value"] < 0.7
    assert np.isnan(own["lo"])
    goodness = found[found["statistic"].isin(["r2_log", "r2_loo", "r2_rank", "r2_worst"])]["value"].dropna()
    assert (goodness <= 1).all()
    each = found[(found["form"] == "multiplicative") & found["scope"].isin(layers) & (found["statistic"] == "r2_log")]
    assert len(each) == 24
    assert row(found, "multiplicative", "r2_worst")["value"] <= row(found, "multiplicative", "r2_log")["value"]


@pytest.mark.parametrize("missing", [0, 40])
def test_projection_gives_the_least_squares_solution_of_the_whole_problem(missing):
    sweep = planted("multiplicative", blocks=3, noise=0.3)
    sweep = sweep.drop(np.random.default_rng(1).choice(len(sweep), missing, replace=False))
    names = list(sweep["layer"].unique())
    layer = sweep["layer"].map(names.index).to_numpy()
    y = np.log(sweep["rel_error"].to_numpy())
    b, x = sweep["bits"].to_numpy(float), np.log1p(sweep["rank"].to_numpy(float))
    own = np.eye(len(names))[layer]
    group = (sweep["group_size"] == 64).to_numpy(float)
    linear = np.column_stack([own, -own * x[:, None], -np.log(2) * b, group])
    best = np.linalg.lstsq(linear, y, rcond=None)[0]
    found = law(sweep, settings=Fit(resamples=1), seed=0)
    assert row(found, "multiplicative", "beta")["value"] == pytest.approx(best[-2], abs=1e-8)
    assert np.log(row(found, "multiplicative", "factor_gptq_g64")["value"]) == pytest.approx(best[-1], abs=1e-8)
    assert row(found, "multiplicative", "delta")["value"] == pytest.approx(best[len(names) : -2].mean(), abs=1e-8)
    frame = residuals(sweep, "multiplicative").set_index(["layer", "bits", "group_size", "rank"])["log_predicted"]
    keys = pd.MultiIndex.from_frame(sweep[["layer", "bits", "group_size", "rank"]])
    np.testing.assert_allclose(frame.loc[keys].to_numpy(), linear @ best, atol=1e-8)

    def additive(theta):
        log_scale, (beta, log_gamma, delta, offset) = theta[: len(names)], theta[len(names) :]
        return log_scale[layer] + np.logaddexp(-np.log(2) * beta * b, log_gamma - delta * x) + offset * group - y

    lost = (residuals(sweep, "additive")["residual"] ** 2).sum()
    guess = np.r_[np.zeros(len(names)), 2, -3, 0.3, 0]
    assert lost <= 2 * least_squares(additive, guess, method="lm").cost * (1 + 1e-4)


def test_leave_one_out_of_a_layer_is_the_residual_over_one_minus_its_leverage():
    sweep = planted("exponential", blocks=1, noise=0.2)
    one = sweep[sweep["layer"] == "blocks.0.up_proj"]
    y = np.log(one["rel_error"].to_numpy())
    group = (one["group_size"] == 64).to_numpy(float)
    linear = np.column_stack([np.ones(len(y)), one["bits"], one["rank"], group]).astype(float)
    hat = linear @ np.linalg.pinv(linear)
    left = (y - hat @ y) / (1 - np.diag(hat))
    expected = 1 - (left**2).sum() / ((y - y.mean()) ** 2).sum()
    found = law(sweep, settings=Fit(resamples=1), seed=0)
    assert row(found, "exponential", "r2_loo", scope="blocks.0.up_proj")["value"] == pytest.approx(expected, abs=1e-9)


def test_the_bootstrap_repeats_with_its_seed_and_only_with_it():
    sweep = planted("multiplicative", blocks=2, groups=(32,), ranks=(0, 4))
    first, again, other = (law(sweep, settings=Fit(resamples=5), seed=seed) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(first, again)
    assert row(first, "multiplicative", "beta")["lo"] != row(other, "multiplicative", "beta")["lo"]
    pd.testing.assert_series_equal(first["value"], other["value"])


def test_kinds_with_different_decays_are_told_apart_and_equal_ones_are_not():
    sweep = planted("multiplicative", decay={"attention": 0.6, "mlp": 0.2}, noise=0.05, groups=(32,))
    found = law(sweep, settings=Fit(resamples=60), seed=0)
    delta = row(found, "multiplicative", "delta_difference", scope="attention-mlp")
    assert 0.35 < delta["lo"] <= 0.4 <= delta["hi"] < 0.45
    beta = row(found, "multiplicative", "beta_difference", scope="attention-mlp")
    assert beta["lo"] < 0 < beta["hi"]
    assert row(found, "exponential", "kappa_difference", scope="attention-mlp")["lo"] > 0
    early = row(found, "multiplicative", "delta_difference", scope="early-late")
    assert abs(early["value"]) < 0.05
    assert early["n"] == 16


def test_what_the_options_cannot_tell_is_missing():
    found = law(planted("multiplicative", blocks=2, ranks=(0,)), settings=Fit(resamples=5), seed=0)
    for form in FORMS:
        assert np.isnan(row(found, form, "r2_rank")["value"])
        assert row(found, form, "r2_rank")["n"] == 0
        assert np.isfinite(row(found, form, "r2_loo")["value"])
    for form, decay in DECAY.items():
        assert np.isnan(row(found, form, decay)["value"])
    assert row(found, "multiplicative", "beta")["value"] == pytest.approx(BETA, abs=0.05)
    found = law(planted("multiplicative", blocks=2, bits=(3,)), settings=Fit(resamples=5), seed=0)
    assert np.isnan(row(found, "multiplicative", "beta")["value"])
    assert row(found, "multiplicative", "delta")["value"] == pytest.approx(DELTA, rel=0.3)


def test_interpolation_finds_left_out_options_where_log_error_is_linear():
    sweep = planted("multiplicative", noise=0, blocks=2)
    frame = residuals(sweep, "interpolation")
    assert frame["residual"].abs().max() < 1e-9
    noisy = law(planted("multiplicative", noise=0.05, blocks=2, groups=(32,)), settings=Fit(resamples=5), seed=0)
    assert 0.97 < row(noisy, "interpolation", "r2_loo")["value"] < 1
    holes = sweep.drop(np.random.default_rng(0).choice(len(sweep), 30, replace=False))
    known = residuals(holes, "interpolation")
    assert len(known) == len(holes)
    assert np.isfinite(known["residual"]).all()
    assert known["residual"].abs().median() < 1e-9


def test_pass_through_rows_are_not_fitted_but_kept_as_costs():
    sweep = planted("multiplicative", blocks=2, groups=(32,), ranks=(0, 4))
    extra = sweep.drop_duplicates("layer").assign(quantizer="none", bits=16, group_size=0, rank=0, rel_error=0.0)
    both = pd.concat([sweep, extra], ignore_index=True)
    pd.testing.assert_frame_equal(
        law(sweep, settings=Fit(resamples=5), seed=0), law(both, settings=Fit(resamples=5), seed=0)
    )
    table = costs(both, inventory(both), fitted("multiplicative"), settings=Fit(), stored=Sweep(), form="additive")
    assert len(table) == len(both)
    assert list(table.loc[table["layer"] == "blocks.0.q_proj", "bits"])[-1] == 16


@pytest.mark.parametrize("form", FORMS)
def test_costs_hold_every_measurement_and_the_extra_ranks(form, tmp_path):
    sweep = planted("multiplicative", blocks=2)
    found = fitted("multiplicative")
    settings = Fit(extra_ranks=[3, 4, 6, 64, 65])
    table = costs(sweep, inventory(sweep), found, settings=settings, stored=Sweep(factor_bits=16), form=form)
    tables.COSTS.write(table, tmp_path / "costs.parquet")
    measured = table[table["source"] == "measured"]
    joined = measured.merge(sweep, on=["layer", "quantizer", "bits", "group_size", "rank"])
    assert len(joined) == len(sweep)
    assert (joined["rel_error_x"] == joined["rel_error_y"]).all()
    new = table[table["source"] != "measured"]
    assert set(new["source"]) == {"interpolation" if form == "interpolation" else "law"}
    assert set(new["rank"]) == {3, 6, 64}  # 4 was swept; 65 exceeds the smaller side
    assert len(new) == 3 * len(sweep) / len(RANKS)
    one = new[(new["rank"] == 6) & (new["bits"] == 3) & (new["group_size"] == 64)].iloc[0]
    assert one["nbytes"] == Option("gptq", 3, 64, 6, 16).nbytes(128, 64)


@pytest.mark.parametrize("form", DECAY)
def test_a_law_predicts_ranks_inside_and_beyond_the_swept_ones(form):
    sweep, truth = (planted(form, noise=0, blocks=2, ranks=ranks) for ranks in (RANKS, (6, 12)))
    found = law(sweep, settings=Fit(resamples=1), seed=0)
    table = costs(sweep, inventory(sweep), found, settings=Fit(extra_ranks=[6, 12]), stored=Sweep(), form=form)
    joined = table.merge(truth, on=["layer", "bits", "group_size", "rank"])
    assert len(joined) == len(truth)
    np.testing.assert_allclose(joined["rel_error_x"], joined["rel_error_y"], rtol=1e-3)


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    noise=st.floats(0, 1),
    form=st.sampled_from(FORMS),
    parameters=st.fixed_dictionaries({name: st.floats(1e-3, 3) for name in ("beta", "gamma", "delta", "kappa")}),
)
def test_predictions_lie_between_the_neighbouring_measured_ranks(seed, noise, form, parameters):
    sweep = planted("multiplicative", blocks=1, noise=noise, seed=seed, groups=(32,))
    rows = [{"form": form, "scope": "pooled", "statistic": name, "value": value} for name, value in parameters.items()]
    found = pd.DataFrame(rows)
    table = costs(sweep, inventory(sweep), found, settings=Fit(extra_ranks=[1, 3, 6, 16]), stored=Sweep(), form=form)
    wide = table.pivot(index=["layer", "bits"], columns="rank", values="rel_error")
    for rank, lower, upper in ((1, 0, 2), (3, 2, 4), (6, 4, 8)):
        ends = wide[[lower, upper]]
        assert (wide[rank] >= ends.min(axis=1) * (1 - 1e-12)).all()
        assert (wide[rank] <= ends.max(axis=1) * (1 + 1e-12)).all()
    assert (wide[16] <= wide[8] * (1 + 1e-12)).all()


def test_residuals_show_what_the_law_misses():
    frame = residuals(planted("multiplicative", noise=0.1), "multiplicative")
    assert list(frame.columns[:4]) == ["layer", "block", "role", "kind"]
    assert {"quantizer", "bits", "group_size", "rank", "log_error", "log_predicted", "residual"} <= set(frame)
    assert frame["residual"].std() == pytest.approx(0.1, rel=0.15)
    assert frame.groupby("layer")["residual"].mean().abs().max() < 1e-9
    missed = residuals(planted("multiplicative", noise=0.1), "additive")
    assert missed["residual"].std() > 0.15


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda sweep: sweep.iloc[:0], "no quantised option"),
        (lambda sweep: sweep.assign(bits=16), "no quantised option"),
        (lambda sweep: sweep.assign(rel_error=sweep["rel_error"].where(sweep.index != 7)), "is nan, not a positive"),
        (lambda sweep: sweep.assign(rel_error=0.0), "is 0.0, not a positive"),
        (lambda sweep: sweep.assign(rel_error=-1.0), "rerun"),
        (
            lambda sweep: sweep[(sweep["bits"] == 2) & (sweep["rank"] == 0) & (sweep["group_size"] == 32)],
            "one quantised",
        ),
        (lambda sweep: pd.concat([sweep, sweep]), "twice"),
    ],
)
def test_a_sweep_that_cannot_be_fitted_is_refused_in_one_line(spoil, words):
    with pytest.raises(BitallocError, match=words) as refusal:
        law(spoil(planted("multiplicative", blocks=2)), settings=QUICK, seed=0)
    assert "\n" not in str(refusal.value)


def test_costs_refuse_what_they_cannot_predict():
    sweep = planted("multiplicative", blocks=2)
    known = {"settings": Fit(extra_ranks=[3]), "stored": Sweep()}
    with pytest.raises(BitallocError, match="did you mean 'additive'"):
        costs(sweep, inventory(sweep), fitted("additive"), **known, form="aditive")
    with pytest.raises(BitallocError, match="unknown form"):
        residuals(sweep, "cubic")
    with pytest.raises(BitallocError, match="does not claim"):
        costs(sweep, inventory(sweep).iloc[1:], fitted("additive"), **known, form="additive")
    with pytest.raises(BitallocError, match="rerun fit"):
        costs(sweep, inventory(sweep), fitted("additive").iloc[:0], **known, form="additive")
    bare = planted("multiplicative", blocks=2, ranks=(0,))
    with pytest.raises(BitallocError, match="two swept ranks"):
        costs(bare, inventory(bare), fitted("additive"), **known, form="interpolation")
