from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bitalloc import config
from bitalloc import evaluate as stage
from bitalloc.compress import compress
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.models import get_weight
from bitalloc.store import Store
from bitalloc.suites import SUITES
from bitalloc.tables import EVALUATE, RESPONSES
from tests.small import CPU, OPTIONS, Small, items, small, tokens

SETTINGS = config.Evaluate(suites=["perplexity", "divergence", "world"], resamples=100)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Small:
    torch.set_num_threads(2)
    return small("gpt2", tmp_path_factory.mktemp("evaluate"))


def run(bench: Small, plans: dict[str, Any], store: Path, **over: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    settings = {"split": "report", "settings": SETTINGS, "tokens": tokens(), "items": items()} | over
    return stage.evaluate(
        plans=plans,
        path=bench.path,
        inventory=bench.inventory,
        experiments=bench.experiments,
        store=Store(store),
        device=CPU,
        **settings,
    )


def value(frame: pd.DataFrame, plan: str, metric: str, task: str = "noise/report") -> float:
    return frame.set_index(["plan", "task", "metric"]).at[(plan, task, metric), "value"]


def test_tables_hold_what_they_promise(bench: Small, tmp_path: Path) -> None:
    plans = {"two": bench.plan(OPTIONS[:1]), "mixed": bench.plan(OPTIONS), "kept": bench.plan(OPTIONS[-1:])}
    frame, responses = run(bench, plans, tmp_path)
    EVALUATE.write(frame, tmp_path / "evaluate.parquet")
    RESPONSES.write(responses, tmp_path / "responses.parquet")
    assert frame["plan"].drop_duplicates().tolist() == ["reference", *plans]
    of_tokens = frame["lo"].isna()
    metrics = frame[(frame["plan"] == "two") & ~of_tokens].groupby("suite")["metric"].unique().map(sorted).to_dict()
    assert metrics == {
        "perplexity": ["bits_per_byte", "median_nll", "nll_nats_per_token", "ppl"],
        "divergence": ["delta_p", "delta_p_rms", "delta_p_squared", "kl_nats_per_token", "ln_ppl_ratio", "top1"],
        "world": ["acc", "flips", "flips_to_right", "flips_to_wrong", "margin_nats"],
    }
    drawn, tokens_alone = frame[~of_tokens], frame[of_tokens]
    assert (drawn["lo"] <= drawn["value"]).all()
    assert (drawn["value"] <= drawn["hi"]).all()
    assert set(drawn["n"]) == {12}
    assert drawn["protocol"].str.contains("bootstrap, 100 resamples").all()
    assert set(tokens_alone["suite"]) == {"divergence"} and set(tokens_alone["n"]) == {12 * 23}
    assert tokens_alone["protocol"].str.endswith("tokens, taken as independent").all()
    ratio = value(frame, "two", "nll_nats_per_token") - value(frame, "reference", "nll_nats_per_token")
    assert value(frame, "two", "ln_ppl_ratio") == pytest.approx(ratio, abs=1e-6)
    assert value(frame, "kept", "log_prob_correlation") == pytest.approx(1)
    assert value(frame, "kept", "kl_max") == value(frame, "kept", "delta_p_rms") == 0
    acc = responses[responses["metric"] == "acc"].pivot(index=["task", "item"], columns="plan", values="value")
    changed = (acc["two"] != acc["reference"]).groupby("task").mean()
    for task, share in changed.items():
        assert value(frame, "two", "flips", task) == pytest.approx(share)
    assert value(frame, "two", "ppl") == pytest.approx(math.exp(value(frame, "two", "nll_nats_per_token")))
    # a plan that passes everything through is the reference; the coarser one departs further
    assert value(frame, "reference", "kl_nats_per_token") == value(frame, "kept", "kl_nats_per_token") == 0
    assert value(frame, "two", "kl_nats_per_token") > value(frame, "mixed", "kl_nats_per_token") > 1e-4
    nll = responses[(responses["plan"] == "two") & (responses["metric"] == "nll_nats_per_token")]
    bits = (nll["value"] * nll["weight"]).sum() / math.log(2) / (12 * 72)
    assert value(frame, "two", "bits_per_byte") == pytest.approx(bits)


def test_the_order_of_plans_and_what_was_there_before_change_nothing(bench: Small, tmp_path: Path) -> None:
    plans = {f"random-{seed}": bench.random_plan(seed) for seed in range(4)}
    _, forward = run(bench, plans, tmp_path / "a")
    _, backward = run(bench, dict(reversed(plans.items())), tmp_path / "b")
    key = list(RESPONSES.key)
    pd.testing.assert_frame_equal(
        forward.sort_values(key, ignore_index=True), backward.sort_values(key, ignore_index=True)
    )


def test_a_checkpoint_scores_as_the_plan_it_was_made_from(bench: Small, tmp_path: Path) -> None:
    plan = bench.plan(OPTIONS)
    compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    _, responses = run(bench, {"plan": plan, "written": tmp_path / "models/p"}, tmp_path / "store")
    plain, written = (responses[responses["plan"] == name].drop(columns="plan") for name in ("plan", "written"))
    pd.testing.assert_frame_equal(plain.reset_index(drop=True), written.reset_index(drop=True))


def test_only_layers_that_differ_are_touched(bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_weight, touched = stage.set_weight, []
    monkeypatch.setattr(stage, "set_weight", lambda *a: (touched.append(a[2]), set_weight(*a)))
    one, two = bench.plan(OPTIONS[:1]), bench.plan(OPTIONS[:1])
    row = OPTIONS[1]
    two.loc[3, ["bits", "rank", "nbytes"]] = [row.bits, row.rank, 0]
    run(bench, {"one": one, "two": two}, tmp_path)
    assert touched == [*bench.layers, bench.layers[3]]


def test_a_run_that_broke_off_goes_on_where_it_stopped(
    bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {f"random-{seed}": bench.random_plan(seed) for seed in range(3)}
    whole = run(bench, plans, tmp_path / "whole")
    measure, measured = stage.Bench.measure, []

    def breaking(self: Any, name: str, subject: Any) -> Any:
        if name == "random-1" and "random-1" not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return measure(self, name, subject)

    monkeypatch.setattr(stage.Bench, "measure", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(bench, plans, tmp_path / "broken")
    resumed = run(bench, plans, tmp_path / "broken")
    assert measured == ["reference", "random-0", "random-1", "random-1", "random-2"]
    for a, b in zip(whole, resumed, strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_shards_belong_to_what_was_scored(bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, measured = stage.Bench.measure, []
    monkeypatch.setattr(
        stage.Bench, "measure", lambda self, name, s: (measured.append(name), measure(self, name, s))[1]
    )
    base = {"p": bench.plan(OPTIONS[:1])}
    run(bench, base, tmp_path)
    run(bench, {"other name": base["p"]}, tmp_path)
    assert measured == ["reference", "p"]
    for change in (
        {"split": "select"},
        {"items": items(5)},
        {"suites": ["perplexity"]},
        {"settings": SETTINGS.model_copy(update={"stride": 8})},
        {"tokens": tokens(length=20)},
    ):
        measured.clear()
        run(bench, base, tmp_path, **change)
        assert measured == ["reference", "p"], change


def test_parts_that_share_the_reference_make_up_the_frames_of_one_job(bench: Small, tmp_path: Path) -> None:
    plans = {f"random-{seed}": bench.random_plan(seed) for seed in range(4)}
    whole = run(bench, plans, tmp_path / "one")
    halves = [
        run(bench, {n: plans[n] for n in names}, tmp_path / "two") for names in (list(plans)[:2], list(plans)[2:])
    ]
    for a, parts in zip(whole, zip(*halves, strict=True), strict=True):
        key = list(EVALUATE.key if "lo" in a else RESPONSES.key)
        pd.testing.assert_frame_equal(a, pd.concat(parts).drop_duplicates(key, ignore_index=True))


def test_the_model_ends_up_with_the_weights_of_the_plan(bench: Small) -> None:
    from bitalloc.suites import Windows

    settings = {"items": items(), "suites": ["perplexity"], "remote_code": False}
    windows = Windows(tokens().iloc[:2], batch=2, device=CPU)
    subject = stage.Bench(
        path=bench.path, inventory=bench.inventory, experiments=bench.experiments, windows=windows, **settings
    )
    subject.put_on(subject.subject("p", bench.plan(OPTIONS)))
    subject.put_on(subject.subject("reference", None))
    for layer in bench.layers:
        W_OI = bench.experiments.checkpoint.weight(layer)
        assert torch.equal(get_weight(subject.model, FAMILIES["gpt2"], layer), W_OI)


def test_bad_input_is_one_line(bench: Small, tmp_path: Path) -> None:
    plan = bench.plan(OPTIONS)
    with pytest.raises(BitallocError, match=r"unknown suite 'perplexty'.*did you mean 'perplexity'"):
        run(bench, {}, tmp_path, suites=["perplexty"])
    with pytest.raises(BitallocError, match=r"plan p is not one of this model: .*attn.* is missing"):
        run(bench, {"p": plan.iloc[1:]}, tmp_path)
    with pytest.raises(BitallocError, match=r"suite world has no items"):
        run(bench, {}, tmp_path, items=items(0))
    with pytest.raises(BitallocError, match=r"no token windows"):
        run(bench, {}, tmp_path, split="nothing")


def test_scores_that_are_not_finite_stop(bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = SUITES["perplexity"]

    def broken(scored: Any) -> Any:
        rows, protocols = responses(scored)
        return rows.assign(value=np.nan), protocols

    monkeypatch.setitem(SUITES, "perplexity", broken)
    with pytest.raises(BitallocError, match="plan reference makes the model's scores NaN or Inf"):
        run(bench, {}, tmp_path)


@pytest.mark.parametrize(
    ("right", "items", "chance", "status"),
    [(30, 40, 0.25, "ok"), (14, 40, 0.25, "floor"), (2, 2, 0.25, "floor"), (3, 3, 0.25, "ok"), (0, 9, 0.0, "floor")],
)
def test_a_task_is_at_the_floor_where_guessing_does_as_well(right: int, items: int, chance: float, status: str) -> None:
    place = {"suite": "world", "task": "t", "metric": "acc", "group": "g", "weight": 1.0}
    rows = [
        {**place, "plan": plan, "item": item, "value": float(item < count)}
        for plan, count in (("reference", right), ("p", items))
        for item in range(items)
    ]
    protocols = {(plan, "world", "t"): "" for plan in ("reference", "p")}
    frame = stage.summarise(pd.DataFrame(rows), protocols, {("world", "t", "acc"): chance}, resamples=500, seed=0)
    frame = frame[frame["metric"] == "acc"]
    assert frame["status"].tolist() == [status, status]  # that of the reference, whatever the plan does
    assert frame["chance"].tolist() == [chance, chance]
