"""Embedding and head as matrices of a plan: measured, allocated, written, loaded, evaluated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitalloc import tables
from bitalloc.allocate import allocate
from bitalloc.compress import compress
from bitalloc.config import Evaluate, Sensitivity, Sweep, parse
from bitalloc.embeddings import embeddings, options
from bitalloc.errors import BitallocError
from bitalloc.evaluate import evaluate
from bitalloc.experiments import Experiments
from bitalloc.formats import gptq, huggingface, packed
from bitalloc.formats.bitalloc import Reader, load_model
from bitalloc.models import load_model as load_source
from bitalloc.models import set_weight
from bitalloc.option import Option, from_row
from bitalloc.store import Store
from bitalloc.tables import EMBEDDINGS
from tests.formats.test_bitalloc import IDS
from tests.small import CPU, OPTIONS, SWEEP, Small, items, small, tokens

TABLES = Sweep(**(SWEEP.model_dump() | {"embedding_bits": [4, 8, 16]}))
ENDS = {  # family -> tables of its random model; OPT's and GPT-2's are tied, as is Qwen2's
    "llama": ["lm_head", "model.embed_tokens"],
    "qwen2": ["model.embed_tokens"],
    "gpt2": ["transformer.wte"],
    "opt": ["model.decoder.embed_tokens"],
}
FOUR = next(option for option in options(TABLES) if option.bits == 4)


def made(family: str, folder: Path) -> tuple[Small, pd.DataFrame]:
    """A random model whose experiments know its tables, and the frame of those."""
    bench = small(family, folder, sweep=TABLES)
    frame = measured(bench)
    known = Experiments(
        checkpoint=bench.experiments.checkpoint,
        inventory=bench.inventory,
        moments=pd.DataFrame(list(bench.experiments.moments.values())),
        store=bench.store,
        sweep=TABLES,
        device=CPU,
        embeddings=frame,
    )
    return replace(bench, experiments=known), frame


def measured(bench: Small, **how: object) -> pd.DataFrame:
    return embeddings(
        checkpoint=bench.experiments.checkpoint,
        inventory=bench.inventory,
        tokens=tokens(),
        sweep=TABLES,
        settings=Sensitivity(windows=4),
        store=bench.store,
        device=CPU,
        **how,
    )


def with_tables(bench: Small, frame: pd.DataFrame, bits: int) -> pd.DataFrame:
    """A plan whose tables have `bits` bits."""
    ends = frame[frame["bits"] == bits].rename(columns={"kl_nats_per_token": "cost_nats_per_token"})
    plan = bench.plan(OPTIONS)
    return pd.concat([plan, ends[plan.columns]], ignore_index=True)


def exchanged(bench: Small, plan: pd.DataFrame) -> torch.nn.Module:
    """The source with the weights of the plan set in it."""
    model = load_source(bench.path, device=CPU)
    for row in plan.to_dict("records"):
        What_OI = bench.experiments.matrix(row["layer"], from_row(row, TABLES)).dequantize()
        set_weight(model, bench.experiments.checkpoint.family, row["layer"], What_OI)
    return model


@pytest.mark.parametrize("family", list(ENDS))
def test_tables_are_measured_alone_and_once(family: str, tmp_path: Path) -> None:
    bench, frame = made(family, tmp_path)
    EMBEDDINGS.write(frame, tmp_path / "embeddings.parquet")
    assert sorted(frame["layer"].unique()) == ENDS[family]
    for layer, part in frame.groupby("layer"):
        kl = part.set_index("bits")["kl_nats_per_token"]
        assert kl[4] > 10 * kl[8] > 0 and kl[16] < 1e-7  # the source is in 16 bits
        model, source = load_source(bench.path, device=CPU), load_source(bench.path, device=CPU)
        set_weight(
            model, bench.experiments.checkpoint.family, layer, bench.experiments.matrix(layer, FOUR).dequantize()
        )
        with torch.inference_mode():
            windows = tokens()
            chosen = windows[windows["split"] == "calibrate"].iloc[[0, 4, 7, 11]]
            ids = torch.from_numpy(np.stack(chosen["tokens"].to_list())).long()
            log_p, log_q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (source, model))
        assert kl[4] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    before = len(list(bench.store.root.rglob("*.json")))
    pd.testing.assert_frame_equal(measured(bench), frame)
    assert len(list(bench.store.root.rglob("*.json"))) == before


def test_a_table_that_the_head_reads_is_quantised_for_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, frame = made("llama", tmp_path)
    rel_error = frame.set_index(["layer", "bits"])["rel_error"]
    model = load_source(bench.path, device=CPU)
    W_VD = model.lm_head.weight.detach()
    E_VD = W_VD - bench.experiments.matrix("lm_head", FOUR).dequantize()
    with torch.inference_mode():
        windows = tokens()
        chosen = windows[windows["split"] == "calibrate"].iloc[[0, 4, 7, 11]]
        ids = torch.from_numpy(np.stack(chosen["tokens"].to_list())).long()
        h_ND = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    assert rel_error["lm_head", 4] == pytest.approx(
        float((h_ND @ E_VD.T).square().sum() / (h_ND @ W_VD.T).square().sum()), rel=1e-3
    )
    E_VD = model.model.embed_tokens.weight.detach() - bench.experiments.matrix("model.embed_tokens", FOUR).dequantize()
    plain = float(E_VD.square().sum() / model.model.embed_tokens.weight.detach().square().sum())
    assert rel_error["model.embed_tokens", 4] == pytest.approx(plain, rel=1e-3)
    # slab by slab it is the same
    monkeypatch.setattr("bitalloc.embeddings.SLAB", 7 * 32)
    monkeypatch.setattr("bitalloc.embeddings.source_digest", lambda *_: "another")
    again = measured(bench)
    assert again["rel_error"].to_numpy() == pytest.approx(frame["rel_error"].to_numpy(), rel=1e-6)


@pytest.mark.parametrize("family", list(ENDS))
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_checkpoints_hold_the_promised_bytes_and_load_packed(family: str, bits: int, tmp_path: Path) -> None:
    bench, frame = made(family, tmp_path)
    plan = with_tables(bench, frame, bits)
    written = compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    assert (written["nbytes"] == written["predicted_nbytes"]).all()
    folder, expected = tmp_path / "models/p", exchanged(bench, plan)
    kept = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(kept.get_input_embeddings(), packed.PackedEmbedding)
    with torch.inference_mode():
        logits = expected(IDS).logits
        assert torch.equal(load_model(folder, device=CPU)(IDS).logits, logits)
        torch.testing.assert_close(kept(IDS).logits, logits, rtol=0, atol=1e-5 * logits.std().item())
    kept.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, kept(IDS).logits)
    half = kept.to(torch.bfloat16)
    assert half.get_input_embeddings()(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_are_those_of_the_plan_and_of_its_checkpoint(family: str, tmp_path: Path) -> None:
    bench, frame = made(family, tmp_path)
    plan = with_tables(bench, frame, 4)
    compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    scored = partial(
        evaluate,
        experiments=bench.experiments,
        tokens=tokens(),
        items=items(),
        split="report",
        settings=Evaluate(suites=["perplexity", "divergence", "world"], resamples=50),
    )
    kept = bench.plan(OPTIONS)
    scores, _ = scored(plans={"kept": kept, "frame": plan, "checkpoint": tmp_path / "models/p"}, store=bench.store)
    values = scores.pivot(index=["suite", "task", "metric"], columns="plan", values="value")
    kl = values.loc[("divergence", "noise/report", "kl_nats_per_token")]
    nll = values.loc[("perplexity", "noise/report", "nll_nats_per_token")]
    assert kl["reference"] < 1e-7 < kl["kept"] < kl["frame"]
    pd.testing.assert_series_equal(values["frame"], values["checkpoint"], check_names=False)
    other = Store(tmp_path / "other")
    scored(plans={}, store=other)  # and goes on in a new process, with tables exchanged from the start, and back
    again, _ = scored(plans={"frame": plan, "kept": kept}, store=other)
    pd.testing.assert_frame_equal(
        again.pivot(index=["suite", "task", "metric"], columns="plan", values="value"),
        values[["frame", "kept", "reference"]],
    )
    model, source, windows = exchanged(bench, plan), load_source(bench.path, device=CPU), tokens()
    ids = torch.from_numpy(np.stack(windows.loc[windows["split"] == "report", "tokens"].to_list())).long()
    with torch.inference_mode():
        log_p, log_q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (source, model))
    assert kl["frame"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert nll["frame"] == pytest.approx(-log_q.gather(-1, ids[:, 1:, None]).mean().item(), rel=1e-4)


# ---- in the budget -------------------------------------------------------------------------------------
def planned(bench: Small, frame: pd.DataFrame | None, *budgets: str, arms: tuple[str, ...] = (), **sweep: object):
    config = parse(
        {
            "sweep": {**TABLES.model_dump(mode="json"), **sweep},
            "allocate": {"budgets": list(budgets), "pool": 3, "runners_up": 1, "arms": list(arms)},
        }
    )
    errors = bench.experiments.rows(bench.layers, [o for o in OPTIONS] + [Option("rtn", 2, 16, 2)])
    sensitivity = errors.drop_duplicates("layer").assign(signal="kl", coefficient=1.0)
    leaked = sensitivity if "leaked" in arms else None
    return allocate(errors.assign(source="measured"), sensitivity, bench.inventory, config, frame, leaked)


def test_tables_share_the_budget_with_the_matrices(tmp_path: Path) -> None:
    bench, frame = made("llama", tmp_path)
    plans, frames = planned(bench, frame, "uniform 4b g16", "5bpw")
    tables.PLANS.write(plans, tmp_path / "plans.parquet")
    weights = sum(r["rows"] * r["columns"] for r in bench.experiments.layers.values()) + 2 * 96 * 32
    assert (plans["nbytes"] <= plans["budget_bytes"]).all()
    for row in plans.to_dict("records"):
        plan = frames[row["plan"]]
        ends = plan[plan["block"] < 0]
        assert sorted(ends["layer"]) == ENDS["llama"]
        assert plan["nbytes"].sum() == row["nbytes"]
        assert row["bits_per_weight"] == pytest.approx(8 * row["nbytes"] / weights)
    one = {name: frames[f"{name}-5bpw"].set_index("layer") for name in ("uniform", "optimal", "manual", "rank_only")}
    matrices = one["uniform"][one["uniform"]["block"] >= 0]
    assert len(matrices[["bits", "rank"]].drop_duplicates()) == 1
    objective = plans.set_index("plan")["objective"]
    assert objective["optimal-5bpw"] <= objective[[f"{name}-5bpw" for name in one]].min()
    named = frames["uniform-uniform-4b-g16"]
    assert plans.set_index("plan")["budget_bytes"]["uniform-uniform-4b-g16"] >= named["nbytes"].sum()


def test_embedding_and_head_are_one_component_of_the_arm(tmp_path: Path) -> None:
    bench, frame = made("llama", tmp_path)
    plans, frames = planned(bench, frame, "5bpw", arms=("component", "leaked"))
    arm = plans[plans["strategy"] == "component"]
    assert set(arm["budget"]) == {"component attention", "component mlp", "component embedding"}
    for row in arm.to_dict("records"):
        plan = frames[row["plan"]]
        ends = plan[plan["block"] < 0]
        assert sorted(ends["layer"]) == ENDS["llama"] and plan["nbytes"].sum() == row["nbytes"]
        harmed = row["budget"] == "component embedding"
        assert set(plan.loc[plan["block"] >= 0, "bits"]) == {16} if harmed else set(ends["bits"]) == {16}
        assert ends["bits"].max() < 16 or not harmed
    assert frames["leaked_1-5bpw"].equals(frames["optimal-5bpw"])  # from the same coefficients


def test_without_an_offer_nothing_changes(tmp_path: Path) -> None:
    bench, frame = made("llama", tmp_path)
    plain, plain_frames = planned(bench, None, "uniform 4b g16", embedding_bits=[16])
    _, frames = planned(bench, frame[frame["bits"] == 16], "uniform 4b g16", embedding_bits=[16])
    for name, plan in plain_frames.items():
        if name.startswith(("uniform", "optimal-")):
            matrices = frames[name].loc[frames[name]["block"] >= 0].reset_index(drop=True)
            pd.testing.assert_frame_equal(matrices, plan)
    assert {"uniform", "optimal"} <= set(plain["strategy"])


def test_formats_that_keep_tables_in_16_bits_say_so(tmp_path: Path) -> None:
    bench, frame = made("llama", tmp_path)
    plain = bench.plan([Option("rtn", 4, 16, 0)])
    plan = pd.concat([plain, with_tables(bench, frame, 4).iloc[len(plain) :]], ignore_index=True)
    compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    for form in (huggingface, gptq):
        with pytest.raises(BitallocError, match=r"export gguf"):
            form.refuse(Reader(tmp_path / "models/p"))


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("llama", 8), ("qwen2", 4)])
def test_gguf_carries_tables(family: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    from tests.formats.test_gguf import export, gguf, read_back, requantised

    bench, frame = made(family, tmp_path)
    plan = with_tables(bench, frame, bits)
    compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    reader = Reader(tmp_path / "models/p")
    target = export(reader)
    assert target.stat().st_size == gguf.nbytes(reader)
    ids = IDS[:, :8]  # no longer than the sliding window
    with torch.inference_mode():
        assert torch.equal(read_back(target)(ids).logits, requantised(reader)(ids).logits)


def test_codes_that_were_lost_are_one_line(tmp_path: Path) -> None:
    bench, frame = made("qwen2", tmp_path)
    key = frame.loc[frame["bits"] == 4, "key"].item()
    bench.store.path(key, ".safetensors").unlink()
    with pytest.raises(BitallocError, match=r"delete embeddings.parquet and rerun"):
        bench.experiments.matrix("model.embed_tokens", FOUR)
