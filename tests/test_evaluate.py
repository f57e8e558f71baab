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
from bitalloc.store import Ledger, Store
from bitalloc.suites import scoring
from bitalloc.tables import EVALUATE, RESPONSES
from tests.small import CPU, OPTIONS, Small, items, small, tokens

SETTINGS = config.Evaluate(suites=["perplexity", "divergence", "world"], resamples=100)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small("gpt2", tmp_path_factory.mktemp("evaluate"))


def run(bench: Small, plans: dict[str, Any], store: Path, **over: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    settings = {"split": "report", "settings": SETTINGS, "tokens": tokens(), "items": items()} | over
    return stage.evaluate(
        plans=plans,
        experiments=bench.experiments,
        store=Store(store),
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


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Windows and choices that the model was given, one entry a batch that was kept."""
    add, kept = Ledger.add, []
    monkeypatch.setattr(Ledger, "add", lambda self, records: (kept.append(len(records)), add(self, records))[1])
    return kept


def test_a_run_that_broke_off_goes_on_after_the_last_batch(
    bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    plans = {f"random-{seed}": bench.random_plan(seed) for seed in range(3)}
    settings = SETTINGS.model_copy(update={"batch": 5})
    whole = run(bench, plans, tmp_path / "whole", settings=settings, rerun=True)
    undisturbed, add = list(passes), Ledger.add
    assert undisturbed[:5] == [5, 5, 2, 12, 12]  # windows of the reference, its items of two tasks
    passes.clear()

    def breaking(self: Any, records: Any) -> None:
        add(self, records)
        if len(passes) in (2, 4, 12):
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "add", breaking)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(bench, plans, tmp_path / "broken", settings=settings, rerun=True)
    resumed = run(bench, plans, tmp_path / "broken", settings=settings, rerun=True)
    assert passes == undisturbed
    for a, b in zip(whole, resumed, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_only_what_is_new_is_scored(bench: Small, tmp_path: Path, passes: list[int]) -> None:
    base, few = {"p": bench.plan(OPTIONS[:1])}, tokens().query("window < 8")
    before, _ = run(bench, base, tmp_path, tokens=few)
    more = items(3)[:3].assign(item=[12, 13, 14], choices=[[[3], [other]] for other in (4, 5, 6)])
    for change, new in (
        ({}, []),
        ({"plans": {"other name": base["p"]}}, []),
        ({"suites": ["divergence", "perplexity"]}, []),
        ({"settings": SETTINGS.model_copy(update={"batch": 3, "resamples": 50})}, []),
        ({"plans": base | {"q": bench.plan(OPTIONS[1:])}}, [8, 12, 12]),  # a plan: its windows and items
        ({"tokens": tokens(12)}, [4, 4]),  # windows, of the reference and the plan
        ({"tokens": tokens(12), "items": pd.concat([items(), more])}, [3, 3]),
        ({"split": "select"}, [8, 8]),
        ({"settings": SETTINGS.model_copy(update={"stride": 8})}, [8, 8]),
    ):
        passes.clear()
        run(bench, **({"plans": base, "store": tmp_path, "tokens": few} | change))
        assert passes == new, change
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".jsonl"} and len(list(tmp_path.rglob("*.jsonl"))) == 9  # a shard for each plan and task
    again, _ = run(bench, base, tmp_path, tokens=few)
    pd.testing.assert_frame_equal(again, before, check_exact=True)


def test_a_damaged_batch_is_scored_again(
    bench: Small, tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture
) -> None:
    settings = {"settings": SETTINGS.model_copy(update={"batch": 5})}
    before = run(bench, {}, tmp_path, **settings)
    (shard,) = (path for path in tmp_path.rglob("*.jsonl") if len(path.read_bytes().splitlines()) == 3)
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(lines[0] + lines[1].replace(b'"nll":"', b'"nll":"A') + lines[2][:40])
    passes.clear(), capsys.readouterr()
    after = run(bench, {}, tmp_path, **settings)
    assert passes == [5, 2]
    assert f"[store] 2 of 3 batches in {shard} are damaged; their items are computed again" in capsys.readouterr().err
    for a, b in zip(before, after, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_random_plans_are_asked_a_subset_and_the_others_everything(bench: Small, tmp_path: Path) -> None:
    plans = {"p": bench.plan(OPTIONS), "random-0": bench.random_plan(0), "random-1": bench.random_plan(1)}
    settings = SETTINGS.model_copy(update={"pool_points": 60, "pool_discordant": 0.2})
    pool = ["random-0", "random-1"]
    frame, responses = run(bench, plans, tmp_path, settings=settings, pool=pool)
    counts = responses[responses["metric"] == "acc"].groupby(["plan", "task"])["item"].unique()
    assert set(counts["random-0", "say"]) == set(counts["random-1", "say"]) < set(counts["p", "say"])
    assert [len(counts[plan, "choose"]) for plan in ("reference", "p", "random-0")] == [12, 12, 10]  # 6 / .6
    nll = responses[responses["metric"] == "nll_nats_per_token"].groupby("plan").size()
    assert set(nll) == {12}  # windows are cheap: everybody reads all
    told = frame[frame["metric"] == "acc"].set_index(["plan", "task"])["protocol"]
    assert "; 10 of 12 items, drawn by seed 0; 95 %" in told["random-0", "say"]
    assert "items" not in told["p", "say"]
    assert value(frame, "random-0", "flips", "say") >= 0


def test_the_reference_is_scored_twice_in_other_batches(bench: Small, tmp_path: Path, passes: list[int]) -> None:
    frame, responses = run(bench, {"p": bench.plan(OPTIONS[:1])}, tmp_path, rerun=True)
    assert responses["plan"].drop_duplicates().tolist() == ["reference", "reference-rerun", "p"]
    for plan, least, most in (("reference-rerun", 0, 1e-6), ("p", 1e-4, 10)):
        assert least <= value(frame, plan, "kl_nats_per_token") < most
    assert value(frame, "reference-rerun", "flips", "choose") == 0
    assert passes == [8, 4, 12, 12, 4, 4, 4, 12, 12, 8, 4, 12, 12]
    both = responses.pivot(index=["task", "metric", "item"], columns="plan", values="value")
    assert np.allclose(both["reference"], both["reference-rerun"], atol=1e-4)
    second, _ = run(bench, {"p": bench.plan(OPTIONS[:1])}, tmp_path, rerun=True, part=(1, 2))
    assert set(second["plan"]) == {"reference"}  # the first part has them


def test_an_evaluation_that_costs_too_much_does_not_start(
    bench: Small, tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture
) -> None:
    plans = {f"random-{seed}": bench.random_plan(seed) for seed in range(3)}
    settings = SETTINGS.model_copy(update={"ceiling_hours": 1e-12})
    with pytest.raises(BitallocError, match=r"estimated to take .* hours, .*ceiling_hours is 1e-12; it would fit"):
        run(bench, plans, tmp_path, settings=settings, pool=list(plans))
    assert not passes
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "[evaluate] 4 plans on cpu"
    windows = next(line.split() for line in said if "noise/report" in line and "pool" in line)
    assert windows[:7] == ["windows", "noise/report", "pool", "3", "36", f"{36 * 23}", "0%"]
    run(bench, plans, tmp_path)
    run(bench, plans, tmp_path, settings=settings, pool=list(plans))  # what is in the store costs nothing


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
    subject = stage.Bench(experiments=bench.experiments, windows=windows, **settings)
    subject.put_on(subject.subject("p", bench.plan(OPTIONS)))
    subject.put_on(stage.Subject({}))
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


def test_scores_that_are_not_finite_stop_and_are_not_kept(
    bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    compare = scoring.compare
    monkeypatch.setattr(scoring, "compare", lambda *a: {k: v * np.nan for k, v in compare(*a).items()})
    with pytest.raises(BitallocError, match="plan reference makes the model's scores NaN or Inf"):
        run(bench, {}, tmp_path)
    assert not passes


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
