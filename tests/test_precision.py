"""Precision maps: names, ranges, bytes, and what the pipeline makes of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import bitalloc.formats.packed  # noqa: F401 - transformers loads what is packed
from bitalloc import precision
from bitalloc.compress import compress
from bitalloc.config import Evaluate
from bitalloc.errors import BitallocError
from bitalloc.evaluate import evaluate, open_bench
from bitalloc.experiments import Experiments
from bitalloc.families import FAMILIES
from bitalloc.models import load_model as load_source
from bitalloc.quant.absmax import absmax
from bitalloc.store import Store
from bitalloc.tables import MOMENTS, PLAN
from tests.small import CPU, SWEEP, Small, items, small, tokens

ENDS = {
    "gpt2": ["wte", "wpe"], "opt": ["wte", "wpe", "project_in", "project_out"], "qwen2": ["wte"],
    "llama": ["wte"], "mistral": ["wte"], "phi": ["wte"], "mamba2": ["wte"],
}  # fmt: skip
NO_MOMENTS = pd.DataFrame(columns=MOMENTS.names)
CHAMPION = {"wte,wpe": "int8", "h.1-h.3.mlp": "fp16", "h.11.attn": "fp16", "ln_f": "fp32", "default": "int8"}


def gpt2(blocks: int = 12, d: int = 768, vocabulary: int = 50257, context: int = 1024) -> pd.DataFrame:
    """INVENTORY of GPT-2 by arithmetic; the weights stored in 16 bits."""
    family, rows = FAMILIES["gpt2"], []

    def add(tensor: str, shape: tuple[int, int], block: int = -1) -> None:
        role, _, kind, _ = family.claim(tensor)
        place = {
            "tensor": tensor,
            "layer": tensor.rpartition(".")[0],
            "block": block,
            "role": role.name if role else "",
        }
        place |= {"kind": kind, "rows": shape[0], "columns": shape[1], "dtype": "float16", "tied": False}
        rows.append(place | {"claimed": role is not None})

    add("transformer.wte.weight", (vocabulary, d))
    add("transformer.wpe.weight", (context, d))
    for block in range(blocks):
        base = f"transformer.h.{block}"
        for leaf, shape in {
            "attn.c_attn": (3 * d, d), "attn.c_proj": (d, d), "mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d),
        }.items():  # fmt: skip
            add(f"{base}.{leaf}.weight", shape, block)
            add(f"{base}.{leaf}.bias", (shape[0], 1), block)
        for norm in ("ln_1", "ln_2"):
            for leaf in ("weight", "bias"):
                add(f"{base}.{norm}.{leaf}", (d, 1), block)
    for leaf in ("weight", "bias"):
        add(f"transformer.ln_f.{leaf}", (d, 1))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def known() -> dict:
    return precision.components(gpt2())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_short_names_and_every_matrix_one(family, tmp_path):
    bench = small(family, tmp_path)
    known = precision.components(bench.inventory)
    parts = ["mixer"] if family == "mamba2" else ["attn", "mlp"]
    inside = [f"h.{block}.{part}" for block in range(3) for part in parts]
    own_head = bool(((bench.inventory["kind"] == "head") & ~bench.inventory["tied"]).any())
    norm = ["ln_f"] if family != "opt" or "ln_f" in known else []
    assert list(known) == [*ENDS[family], *inside, *norm, *["lm_head"] * own_head]
    tensors = [tensor for names in known.values() for tensor in names]
    assert len(tensors) == len(set(tensors))
    assert set(precision.rounded(bench.inventory)["tensor"]) <= set(tensors)


def test_published_sizes_of_gpt2_by_arithmetic(known):
    """248.9 and 141.1 MB are reached with the vectors at 16 bits and without the scales; stored, there are scales."""
    inventory = gpt2()
    half, mixed = precision.parse({"default": "fp16"}, known), precision.parse(CHAMPION, known)
    assert precision.nbytes(inventory, half) == 248_879_616
    assert precision.nbytes(inventory, mixed, scales=False) == 141_079_296
    rows = 50257 + 1024 + 11 * (3 * 768 + 768) + 9 * (4 * 768 + 768)
    assert precision.nbytes(inventory, mixed) == 141_079_296 + 2 * rows == 141_318_562


def test_a_map_names_components_blocks_and_ranges(known):
    found = precision.parse(CHAMPION, known)
    high = [component for component in known if found[component] == "fp16"]
    assert high == ["h.1.mlp", "h.2.mlp", "h.3.mlp", "h.11.attn"] and found["ln_f"] == "fp32"
    assert precision.parse({"h.7-h.11": "int4"}, known)["h.9.attn"] == "int4"
    assert precision.parse({"h.7": "int4"}, known) == precision.parse({"h.7.attn, h.7.mlp": "int4"}, known)
    assert set(precision.parse({}, known).values()) == {"fp16"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"h.24.mlp": "int8"}, "'h.24.mlp' names block 24, the model has h.0 to h.11"),
        ({"h.7-h.23": "int8"}, "'h.7-h.23' names block 23, the model has h.0 to h.11"),
        ({"h.5-h.3": "int8"}, "ends before it begins; write h.3-h.5"),
        ({"h.1-h.3.mlp": "fp16", "h.3": "int8"}, "'h.1-h.3.mlp' and 'h.3' both name h.3.mlp; remove one"),
        ({"h.3.mixer": "int8"}, "no component 'h.3.mixer'"),
        ({"lm_head": "int8"}, "no component 'lm_head'"),
        ({"wte": "int9"}, "unknown precision 'int9' of wte: did you mean 'int8'?"),
        ({"default": 8}, "unknown precision 8 of default"),
    ],
)
def test_bad_maps_are_one_line(known, given, said):
    with pytest.raises(BitallocError, match=r".") as error:
        precision.parse(given, known)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"wte": "int8", "wte": "fp16"}', "'wte' stands there twice"),
        ("b.json", '{"wte": ', "cannot read the precision map"),
        ("c.yaml", "wte: [int8", "cannot read the precision map"),
        ("d.yaml", "wte: 8", "is no precision map"),
        ("e.json", "[1]", "is no precision map"),
        ("none.json", None, "cannot read the precision map"),
    ],
)
def test_bad_files_are_one_line(known, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BitallocError, match=r".") as error:
        precision.parse(tmp_path / name, known)
    assert said in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_compact_is_undone_by_parse(known, data):
    mapping = {name: data.draw(st.sampled_from(["int8", "fp16", "int4"])) for name in known}
    written = precision.compact(mapping)
    assert precision.parse(written, known) == mapping
    assert len(written) <= len(mapping)


def test_files_carry_maps(known, tmp_path):
    mapping = precision.parse(CHAMPION, known)
    (tmp_path / "a.json").write_text(json.dumps(precision.compact(mapping)))
    (tmp_path / "b.yaml").write_text("default: int8\nh.1-h.3.mlp: fp16\nh.11.attn: fp16\nln_f: fp32\n")
    assert precision.parse(tmp_path / "a.json", known) == precision.parse(tmp_path / "b.yaml", known) == mapping


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_moves_by_more_than_half_a_step(bits):
    W_OI = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    W_OI[3] = 0
    stored = absmax(W_OI, precision.option(f"int{bits}", 50))
    assert stored.nbytes == stored.option.nbytes(7, 50)
    step_O1 = W_OI.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((stored.dequantize() - W_OI).abs() <= 0.501 * step_O1).all())


MAP = {"default": "int8", "h.0-h.1.mlp": "fp16", "h.2.mlp": "int4"}


def made(family: str, folder: Path) -> tuple[Small, pd.DataFrame]:
    """A model of which no moment is known, and the plan of the map."""
    bench = small(family, folder)
    experiments = Experiments(
        checkpoint=bench.experiments.checkpoint, inventory=bench.inventory, moments=NO_MOMENTS, store=bench.store,
        sweep=SWEEP, device=CPU,
    )  # fmt: skip
    mapping = precision.parse(MAP, precision.components(bench.inventory))
    return replace(bench, experiments=experiments), precision.plan(bench.inventory, mapping)


def by_hand(bench: Small, plan: pd.DataFrame) -> torch.nn.Module:
    """The source with every matrix of the plan rounded in place, the plainest way."""
    model = load_source(bench.path, device=CPU)
    for row in plan.itertuples():
        turned = bench.experiments.checkpoint.family.turned(row.layer)
        weight = model.get_submodule(row.layer).weight.detach()
        W_OI = weight.T if turned else weight
        if row.bits < 16:
            top = 2 ** (row.bits - 1) - 1
            scale_O1 = (W_OI.abs().amax(1, keepdim=True) / top).half().float()
            W_OI.copy_((W_OI / scale_O1).round().clamp(-top, top) * scale_O1)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_plans_run_without_moments_and_score_what_they_are(family: str, tmp_path: Path) -> None:
    bench, plan = made(family, tmp_path)
    PLAN.write(plan, tmp_path / "plan.parquet")
    ends = {"gpt2": {"transformer.wte", "transformer.wpe"}, "llama": {"model.embed_tokens", "lm_head"}}
    assert set(plan["layer"]) == set(bench.layers) | ends[family]
    written = compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    assert (written["nbytes"] == written["predicted_nbytes"]).all()
    scores, _ = evaluate(
        plans={"plan": plan, "checkpoint": tmp_path / "models/p"},
        experiments=bench.experiments, tokens=tokens(), items=items(), split="report",
        settings=Evaluate(suites=["perplexity", "divergence"], resamples=50),
    )  # fmt: skip
    values = scores.pivot(index="metric", columns="plan", values="value")
    pd.testing.assert_series_equal(values["plan"], values["checkpoint"], check_names=False)
    windows = tokens()
    ids = torch.from_numpy(np.stack(windows.loc[windows["split"] == "report", "tokens"].to_list())).long()
    with torch.inference_mode():
        expected = by_hand(bench, plan)
        logits = [model(ids).logits[:, :-1].double() for model in (load_source(bench.path, device=CPU), expected)]
        log_p, log_q = (each.log_softmax(-1) for each in logits)
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "models/p", dtype=torch.float32)(ids).logits[:, :-1]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert values.loc["kl_nats_per_token", "plan"] == pytest.approx(kl, rel=1e-4) and kl > 1e-5
    torch.testing.assert_close(kept.double(), logits[1], rtol=0, atol=1e-5 * logits[1].std().item())


def test_a_bench_that_meets_an_embedding_late_keeps_the_unquantised_head(tmp_path: Path) -> None:
    bench, plan = made("gpt2", tmp_path)
    scored = open_bench(
        experiments=bench.experiments, tokens=tokens(), items=items(),
        split="report", settings=Evaluate(suites=["divergence"]),
    )  # fmt: skip

    def kl(frame: pd.DataFrame) -> float:
        subject = scored.subject("p", frame)
        scored.expect({"p": subject})
        rows = scored.measure("p", subject, scored.works(subject))["rows"]
        return rows.loc[rows["metric"] == "kl_nats_per_token", "value"].mean()

    inside = plan[plan["block"] >= 0]
    first = kl(inside)
    assert 0 < first < kl(plan)
    assert scored.memory(scored.subject("p", inside)).known(scored.place)
    scored.store = Store(tmp_path / "other")
    assert kl(inside) == pytest.approx(first, rel=1e-6)


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    bench, plan = made("gpt2", tmp_path)
    with pytest.raises(BitallocError, match=r"plan p is not one of this model: nowhere"):
        open_bench(
            experiments=bench.experiments, tokens=tokens(), items=items(),
            split="report", settings=Evaluate(suites=["divergence"]),
        ).subject("p", plan.replace({"layer": {"transformer.wpe": "nowhere"}}))  # fmt: skip


def test_positions_that_shift_their_ids_are_scored_but_not_packed(tmp_path: Path) -> None:
    bench, plan = made("opt", tmp_path)
    assert "model.decoder.embed_positions" in set(plan["layer"])
    compress({"p": plan}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    with pytest.raises(
        BitallocError, match="OPTLearnedPositionalEmbedding, which cannot be packed; keep it at 16 bits"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "models/p")
