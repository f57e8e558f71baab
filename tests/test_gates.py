"""Every gate: GO, NO-GO, warn, fallback, missing and empty evidence; the verdict file and the wording."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from bitalloc import gates, tables
from bitalloc.config import Checks, Gates, Sensitivity
from bitalloc.errors import BitallocError

STOP = Gates()
WARN = Gates(mode="warn")


def checked(frame, tmp_path):
    """check -> row, after the frame has proved to be a GATES table."""
    tables.GATES.write(frame, tmp_path / "gates.parquet")
    return frame.set_index("check")


def verdict(gate, frame, tmp_path):
    gates.write_verdict(tmp_path / f"{gate}.json", gate, frame)
    return gates.read_verdict(str(tmp_path / f"{gate}.json"))


def only(**checks):
    """The default gates but for some checks."""
    return Gates(checks=Checks(**checks))


# ---------------------------------------------------------------------------------------------- sweep


def sweep_frame(flat=False):
    rows = [
        {"layer": f"l{block}.{role}", "block": block, "bits": bits, "rank": rank,
         "rel_error": (1 if flat else (block + 1) * 4.0**-bits / (rank + 1))}
        for block in range(3) for role in "ab" for bits in (2, 3, 4) for rank in (0, 4)
    ]  # fmt: skip
    passed = [
        {"layer": f"l{b}.{r}", "block": b, "bits": 16, "rank": 0, "rel_error": 1e-9} for b in range(3) for r in "ab"
    ]
    return pd.DataFrame(rows + passed)


def sensitivity_frame(*coefficients):
    fisher = pd.DataFrame({"signal": "fisher", "coefficient": [1.0, 1.0]})
    return pd.concat([pd.DataFrame({"signal": "kl", "coefficient": coefficients}), fisher], ignore_index=True)


def sweep_gate(sweep=None, coefficients=(0.1, 1.0), expected=42, criteria=STOP):
    return gates.gate_sweep(
        sweep=sweep_frame() if sweep is None else sweep,
        sensitivity=sensitivity_frame(*coefficients),
        gates=criteria,
        settings=Sensitivity(),
        expected=expected,
    )


def test_sweep_go(tmp_path):
    rows = checked(sweep_gate(), tmp_path)
    assert rows["go"].all()
    assert rows.loc["completeness", "value"] == 1
    assert rows.loc["sensitivity_spread", "value"] == pytest.approx(10)
    assert rows.loc["error_range", "value"] == pytest.approx(16 * 5)  # 16-bit rows do not count
    assert rows.loc["layer_spread", "value"] == pytest.approx(3)
    assert verdict("sweep", sweep_gate(), tmp_path)["go"]


def test_sweep_no_go_names_each_criterion(tmp_path):
    rows = checked(sweep_gate(sweep_frame(flat=True), (1.0, 2.0), expected=50), tmp_path)
    assert not rows["go"].any()
    assert rows.loc["completeness", "value"] == pytest.approx(42 / 50)
    assert not verdict("sweep", sweep_gate(sweep_frame(flat=True)), tmp_path)["go"]


def test_sweep_evidence_that_is_missing_is_a_no_go(tmp_path):
    spoilt = sweep_frame()
    spoilt.loc[3, "rel_error"] = np.nan
    assert not checked(sweep_gate(spoilt), tmp_path).loc["completeness", "go"]
    for coefficients in ((), (np.nan, 1.0, 10.0), (0.0,)):
        spread = checked(sweep_gate(coefficients=coefficients), tmp_path).loc["sensitivity_spread"]
        assert np.isnan(spread["value"])
        assert not spread["go"]
    empty = checked(sweep_gate(sweep_frame().iloc[:0], (), expected=0), tmp_path)
    assert empty["value"].isna().all()
    assert not empty["go"].any()
    # no row at the probe option
    other = checked(sweep_gate(sweep_frame().query("bits != 3")), tmp_path)
    assert np.isnan(other.loc["layer_spread", "value"])


# ---------------------------------------------------------------------------------------------- fit


def law_frame(form="multiplicative", **changes):
    values = {
        ("pooled", "r2_log"): 0.99, ("pooled", "r2_loo"): 0.98, ("pooled", "r2_rank"): 0.8, ("pooled", "beta"): 2.0,
        ("pooled", "kappa" if form == "exponential" else "delta"): 0.3, ("attention", "r2_log"): 0.97,
        ("mlp", "r2_log"): 0.96,
    }  # fmt: skip
    rows = [
        {"form": form, "scope": scope, "statistic": name, "value": changes.get(f"{scope}_{name}", value)}
        for (scope, name), value in values.items()
    ]
    rows.append({"form": "interpolation", "scope": "pooled", "statistic": "r2_loo", "value": 0.995})
    frame = pd.DataFrame(rows)
    frame["lo"] = frame["value"] - changes.get("margin", 0.1)
    return frame


@pytest.mark.parametrize("form", ["multiplicative", "additive", "exponential"])
def test_fit_go(form, tmp_path):
    frame = gates.gate_fit(law=law_frame(form), gates=STOP, form=form)
    rows = checked(frame, tmp_path)
    assert rows["go"].all()
    assert rows.loc["beta", "value"] == pytest.approx(1.9)
    assert rows.loc["delta", "value"] == pytest.approx(0.2)
    assert rows.loc["r2_interpolation", "value"] == 0.995
    assert (rows["evidence"] == "law.parquet").all()
    assert verdict("fit", frame, tmp_path)["route"] == "law"


def test_a_kind_that_the_model_has_not_is_not_asked_for(tmp_path):
    frame = law_frame()
    mixers = frame[~frame["scope"].isin(["attention", "mlp"])]
    rows = checked(gates.gate_fit(law=mixers, gates=STOP, form="multiplicative"), tmp_path)
    assert {"r2_attention", "r2_mlp"}.isdisjoint(rows.index) and rows["go"].all()
    assert not gates.gate_fit(law=mixers.iloc[:0], gates=STOP, form="multiplicative")["go"].any()


@pytest.mark.parametrize("low", ["pooled_r2_log", "pooled_r2_loo", "pooled_r2_rank", "attention_r2_log", "mlp_r2_log"])
def test_fit_falls_back_to_interpolation(low, tmp_path):
    found = verdict("fit", gates.gate_fit(law=law_frame(**{low: 0.1}), gates=STOP, form="multiplicative"), tmp_path)
    assert found["go"]
    assert found["route"] == "interpolation"
    missing = law_frame(**{low: np.nan})
    assert verdict("fit", gates.gate_fit(law=missing, gates=STOP, form="multiplicative"), tmp_path)["go"]


def test_fit_stops_where_the_fallback_fails_too_or_a_decay_may_be_none(tmp_path):
    poor = law_frame(pooled_r2_log=0.1)
    poor.loc[poor["form"] == "interpolation", "value"] = 0.5
    assert not verdict("fit", gates.gate_fit(law=poor, gates=STOP, form="multiplicative"), tmp_path)["go"]
    flat = gates.gate_fit(law=law_frame(margin=0.4), gates=STOP, form="multiplicative")
    assert not checked(flat, tmp_path).loc["delta", "go"]
    assert not verdict("fit", flat, tmp_path)["go"]
    empty = gates.gate_fit(law=law_frame().iloc[:0], gates=STOP, form="multiplicative")
    assert checked(empty, tmp_path)["value"].isna().all()
    found = verdict("fit", empty, tmp_path)
    assert (found["go"], found["route"]) == (False, "interpolation")


# ---------------------------------------------------------------------------------------------- allocate


def plans_frame(*rows):
    """(strategy, budget, bits a weight, objective)"""
    return pd.DataFrame(
        [
            {"plan": f"{strategy}-{budget}", "strategy": strategy, "budget": budget, "budget_bytes": round(bpw * 1000),
             "nbytes": round(bpw * 1000) - 10, "bits_per_weight": 8 * (round(bpw * 1000) - 10) / 8000,
             "objective": objective}
            for strategy, budget, bpw, objective in rows
        ],
        columns=["plan", "strategy", "budget", "budget_bytes", "nbytes", "bits_per_weight", "objective"],
    )  # fmt: skip


def test_allocate_takes_the_best_budget_and_falls_back_where_uniform_is_as_good(tmp_path):
    rows = [("uniform", "low", 2.2, 1.0), ("optimal", "low", 2.2, 1.0), ("uniform", "mid", 2.6, 1.0)]
    frame = gates.gate_allocate(plans=plans_frame(*rows, ("optimal", "mid", 2.6, 0.8)), gates=STOP)
    assert checked(frame, tmp_path).loc["objective_gap", "value"] == pytest.approx(0.2)
    assert verdict("allocate", frame, tmp_path)["route"] == "optimal"
    frame = gates.gate_allocate(plans=plans_frame(*rows, ("optimal", "mid", 2.6, 0.999)), gates=STOP)
    found = verdict("allocate", frame, tmp_path)
    assert (found["go"], found["route"]) == (True, "near_uniform")
    frame = gates.gate_allocate(plans=plans_frame(("optimal", "mid", 2.6, 0.8)), gates=STOP)
    assert np.isnan(checked(frame, tmp_path).loc["objective_gap", "value"])
    assert verdict("allocate", frame, tmp_path)["route"] == "near_uniform"


# ---------------------------------------------------------------------------------------------- pilot


def pilot_gate(nll, kl=None, criteria=STOP, bpw=2.6):
    """`nll` of plan -> mean over corpora; at 3.3 bits a weight everybody is equal. KL is nll unless given."""
    names = [name for name in nll if name != "reference"]
    # what keeps to no budget, or has seen the report windows, is never the pilot's
    pool = [("random", "mid", bpw, 1.0)] * 2 + [("component", "component mlp", 2.5, 1.0), ("leaked_1", "mid", bpw, 1.0)]
    plans = plans_frame(*(("manual", "high", 3.3, 1.0), *pool), *((name, "mid", bpw, 1.0) for name in names))
    values = {name if name == "reference" else f"{name}-mid": value for name, value in nll.items()}
    divergence = values | {f"{name}-mid": value for name, value in (kl or {}).items()}
    rows = [
        {"plan": plan, "suite": suite, "task": task, "metric": metric, "value": value + shift}
        for suite, metric, found in (
            ("perplexity", "nll_nats_per_token", values | {"random-mid": 0.0, "manual-high": 1.0}),
            ("divergence", "kl_nats_per_token", divergence),
            ("perplexity", "ppl", values),
        )
        for plan, value in found.items()
        for task, shift in (("a/select", -0.5), ("b/select", 0.5))
    ]
    return gates.gate_pilot(plans=plans, evaluate=pd.DataFrame(rows), gates=criteria)


def test_pilot_go(tmp_path):
    nll = {"reference": 1.0, "uniform": 1.2, "manual": 1.15, "optimal": 1.14, "optimal_2": 1.1, "greedy": 0.9}
    rows = checked(pilot_gate(nll), tmp_path)
    assert rows["go"].all()
    assert rows.loc["manual_gain", "value"] == pytest.approx(1 - math.exp(-0.05))
    assert rows.loc["optimal_recovery", "value"] == pytest.approx(0.5)  # the runner-up; baselines never count
    assert "9.5% below uniform at mid" in rows.loc["optimal_recovery", "why"]
    picked = checked(pilot_gate(nll, kl={"optimal": 0.1, "optimal_2": 0.2}), tmp_path)
    assert picked.loc["optimal_recovery", "value"] == pytest.approx(0.3)
    uniform = checked(pilot_gate(nll, kl={"uniform": 0.1}), tmp_path)
    assert uniform.loc["optimal_recovery", "value"] == 0
    chosen = checked(pilot_gate(nll | {"best": 1.05}, kl={"best": 9.0}), tmp_path)
    assert chosen.loc["optimal_recovery", "value"] == pytest.approx(0.75)


def test_pilot_a_gain_of_five_percent_passes_without_the_recovery(tmp_path):
    nll = {"reference": 0.0, "uniform": 1.2, "manual": 1.15}
    rows = checked(pilot_gate(nll | {"optimal": 1.14}), tmp_path)
    assert rows.loc["optimal_recovery", "value"] == pytest.approx(0.05)
    assert rows.loc["optimal_recovery", "go"]
    rows = checked(pilot_gate(nll | {"optimal": 1.16}), tmp_path)
    assert not rows.loc["optimal_recovery", "go"]
    assert "3.9% below uniform" in rows.loc["optimal_recovery", "why"]


def test_pilot_no_go_and_missing(tmp_path):
    nll = {"reference": 1.0, "uniform": 1.2, "manual": 1.21, "optimal": 1.19}
    rows = checked(pilot_gate(nll), tmp_path)
    assert not rows["go"].any()
    assert rows.loc["manual_gain", "value"] < 0
    assert not verdict("pilot", pilot_gate(nll), tmp_path)["go"]
    for lost in nll:
        rest = {name: value for name, value in nll.items() if name != lost}
        missing = checked(pilot_gate(rest), tmp_path)
        needs = {"manual": ["manual_gain"], "uniform": list(missing.index)}.get(lost, ["optimal_recovery"])
        assert list(missing.index[missing["value"].isna()]) == needs
        assert not missing["go"].any()
    spoilt = checked(pilot_gate(nll | {"uniform": np.nan}), tmp_path)
    assert spoilt["value"].isna().all()
    # uniform lost nothing, so there is nothing to recover
    assert np.isnan(checked(pilot_gate(nll | {"uniform": 0.9}), tmp_path).loc["optimal_recovery", "value"])
    empty = gates.gate_pilot(
        plans=plans_frame(),
        evaluate=pd.DataFrame(columns=["plan", "suite", "task", "metric", "value"]),
        gates=STOP,
    )
    assert checked(empty, tmp_path)["value"].isna().all()


def test_pilot_without_a_budget_in_the_steep_range_states_no_recovery(tmp_path):
    nll = {"reference": 1.0, "uniform": 1.2, "manual": 1.1, "optimal": 1.05}
    rows = checked(pilot_gate(nll, bpw=3.0), tmp_path)
    assert rows.loc["manual_gain", "value"] == pytest.approx(1 - math.exp(-0.1))  # 3.0 is the smallest budget
    assert np.isnan(rows.loc["optimal_recovery", "value"])
    assert not rows.loc["optimal_recovery", "go"]


# ---------------------------------------------------------------------------------------------- compress, downstream


def test_compress(tmp_path):
    def gate(*nbytes):
        frame = pd.DataFrame({"predicted_nbytes": [10_000] * len(nbytes), "nbytes": nbytes})
        return gates.gate_compress(checkpoints=frame, gates=STOP)

    good = checked(gate(10_000, 9_995, 10_010), tmp_path).loc["predicted_bytes"]
    assert good["go"]
    assert good["value"] == pytest.approx(0.001)
    assert good["comparison"] == "<="
    assert not checked(gate(10_000, 9_980), tmp_path).loc["predicted_bytes", "go"]
    assert np.isnan(checked(gate(), tmp_path).loc["predicted_bytes", "value"])


def downstream_gate(best, reference=0.9, floor=(), small=0.1):
    plans = plans_frame(("best", "low", 2.6, 1.0), ("best", "high", 3.3, 1.0), ("uniform", "high", 3.3, 1.0))
    rows = [
        {"plan": plan, "suite": "world", "task": task, "metric": "acc", "value": value}
        | {"status": "floor" if task in floor else "ok"}
        for task, shift in (("facts", 0.0), ("sums", 0.05))
        for plan, value in (
            ("reference", reference),
            ("best-low", small),
            ("best-high", None if best is None else best + shift),
            ("uniform-high", 0.0),
        )
        if value is not None
    ]
    rows.append({"plan": "reference", "suite": "divergence", "task": "t", "metric": "top1", "value": 1.0})
    return gates.gate_downstream(plans=plans, evaluate=pd.DataFrame(rows), gates=STOP)


def test_downstream_reads_the_best_plan_of_the_largest_budget(tmp_path):
    good = checked(downstream_gate(0.885), tmp_path).loc["downstream"]
    assert good["go"]
    assert good["value"] == pytest.approx(1.5)
    limit = checked(downstream_gate(0.98, reference=1.0), tmp_path).loc["downstream"]
    assert 100 * (1 - 0.98) > 2  # in binary
    assert limit["go"]
    bad = checked(downstream_gate(0.85), tmp_path).loc["downstream"]
    assert not bad["go"]
    assert bad["value"] == pytest.approx(5)


def test_downstream_skips_tasks_at_the_floor_and_has_nothing_to_say_without_tasks(tmp_path):
    at_floor = checked(downstream_gate(0.6, reference=0.7, floor=["facts"]), tmp_path).loc["downstream"]
    assert at_floor["value"] == pytest.approx(5)  # facts, 10 points down, is left out; sums is not
    none = downstream_gate(0.5, floor=["facts", "sums"])
    assert none.empty
    found = verdict("downstream", none, tmp_path)
    assert (found["go"], found["checks"]) == (True, [])
    assert not verdict("sweep", none, tmp_path)["go"]


def test_downstream_missing_scores_are_a_no_go(tmp_path):
    for frame in (downstream_gate(None), downstream_gate(np.nan)):
        assert np.isnan(checked(frame, tmp_path).loc["downstream", "value"])
        assert not verdict("downstream", frame, tmp_path)["go"]
    columns = ["plan", "suite", "task", "metric", "value", "status"]
    empty = gates.gate_downstream(plans=plans_frame(), evaluate=pd.DataFrame(columns=columns), gates=STOP)
    assert not checked(empty, tmp_path).loc["downstream", "go"]


# ---------------------------------------------------------------------------------------------- modes and wording


def test_warn_never_stops_whether_for_all_or_for_one_check(tmp_path):
    flat = sweep_frame(flat=True)
    for criteria in (WARN, only(**{
        name: {"threshold": threshold, "mode": "warn", "why": "tiny"}
        for name, threshold in {"error_range": 10, "layer_spread": 1.5}.items()
    })):  # fmt: skip
        frame = sweep_gate(flat, criteria=criteria)
        assert not frame.set_index("check").loc["error_range", "go"]
        assert verdict("sweep", frame, tmp_path)["go"]
        assert gates.message(frame) == ""
    assert frame.set_index("check").loc["error_range", "why"] == "tiny"
    # a fallback keeps choosing the route under gates.mode: warn
    fit = gates.gate_fit(law=law_frame(pooled_r2_log=0.1), gates=WARN, form="multiplicative")
    assert verdict("fit", fit, tmp_path)["route"] == "interpolation"


def test_the_message_says_criterion_value_threshold_evidence_and_remedy():
    text = gates.message(sweep_gate(sweep_frame(flat=True), (1.0, 2.0)))
    lines = text.splitlines()
    assert len(lines) == 3
    assert "gate sweep: sensitivity_spread is 2, must be > 3 (evidence: sensitivity.parquet)" in lines[0]
    for line, name in zip(lines, ("sensitivity_spread", "error_range", "layer_spread"), strict=True):
        for remedy in (f"gates.checks.{name}.threshold", f"gates.checks.{name}.mode: warn", "gates.mode: warn"):
            assert remedy in line
    assert "could not be measured" in gates.message(sweep_gate(coefficients=()))


@pytest.mark.parametrize(("floors", "go"), [([False, False, True], True), ([False, True, True], False)])
def test_fairness_needs_two_languages_above_their_floor(floors, go, tmp_path):
    spoken = pd.DataFrame({"language": ["en", "he", "ar"] * 2, "floor": floors * 2})
    frame = gates.gate_fairness(languages=spoken, gates=STOP)
    assert checked(frame, tmp_path).at["languages", "value"] == floors.count(False)
    assert verdict("fairness", frame, tmp_path)["go"] is go


def test_a_verdict_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "fit.json"
    for text in (None, "", "{", "[]", '{"go": true}', json.dumps({"gate": "g", "go": 1, "route": "r", "checks": []})):
        if text is not None:
            path.write_text(text)
        with pytest.raises(BitallocError, match="delete it and rerun"):
            gates.read_verdict(path)


def test_reading_a_verdict_needs_the_standard_library_alone():
    script = (
        "import sys; from bitalloc.gates import read_verdict, message; "
        "heavy = {'pandas', 'numpy', 'pyarrow', 'pydantic', 'torch'}; "
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "[]"
