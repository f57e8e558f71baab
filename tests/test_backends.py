"""Backends: one plan, many ways to run it; what agrees, what is refused, what is left alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from bitalloc import backends, figures
from bitalloc.backends import BACKENDS, MEASURED, Runnable, Subject, measure
from bitalloc.config import Backends, Evaluate, Sweep
from bitalloc.errors import BitallocError
from bitalloc.formats import bitalloc
from bitalloc.models import load_model
from bitalloc.option import Option
from bitalloc.tables import BACKENDS as TABLE
from tests.small import CPU, small, tokens
from tests.test_figures import STAMP, drawn

SETTINGS = Evaluate(resamples=50)
TOKENS = tokens(windows=6)
MIXED = (Option("rtn", 2, 16, 0), Option("rtn", 3, 16, 2), Option("rtn", 8, 16, 0), Option("none", 16, 0, 0))
WORDS = (*(Option("rtn", bits, 16, 0) for bits in (2, 4, 8)), Option("none", 16, 0, 0))
CODES = (*(Option("rtn", bits, 16, 0) for bits in (2, 3, 4, 8)), Option("none", 16, 0, 0))
ROWS = (Option("rtn", 8, 48, 0, symmetric=True), Option("none", 16, 0, 0))


def subject(folder: Path, options: Sequence[Option], family: str = "llama") -> Subject:
    symmetric = options[0].symmetric
    sweep = Sweep(quantizers=["rtn"], bits=[2, 3, 4, 8, 16], group_sizes=[16, 48], ranks=[0, 2], symmetric=symmetric)
    bench = small(family, folder, sweep=sweep)
    bitalloc.save(
        folder / "native",
        source=bench.experiments.checkpoint,
        inventory=bench.inventory,
        plan=bench.plan(options),
        matrix=bench.experiments.matrix,
        sweep=sweep,
        extra={},
    )
    scratch = folder / "scratch"
    scratch.mkdir()
    return Subject(bitalloc.Reader(folder / "native"), bench.path, scratch, CPU)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Codes alone, in a model with biases and a head tied to its embedding."""
    return subject(tmp_path_factory.mktemp("codes"), CODES, "qwen2")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Codes that fill the words of GPTQ."""
    return subject(tmp_path_factory.mktemp("words"), WORDS, "qwen2")


def run(name: str, of: Subject) -> pd.Series:
    frame = measure(name, plan="p", subject=of, tokens=TOKENS, settings=SETTINGS)
    assert len(frame) == 1
    return frame.iloc[0]


def test_what_carries_the_plan_scores_what_was_simulated(mixed: Subject) -> None:
    simulated = run("dequantised", mixed)
    assert simulated["status"] == MEASURED and simulated["max_logit_difference"] == 0
    assert simulated["kl_nats_per_token"] > 0.01 and simulated["kl_lo"] < simulated["kl_nats_per_token"]
    for name in ("native", "huggingface"):
        found = run(name, mixed)
        assert 0 < found["max_logit_difference"] < 1e-5
        for metric in ("ppl", "ppl_lo", "ppl_hi", "kl_nats_per_token", "kl_lo", "kl_hi"):
            assert found[metric] == pytest.approx(simulated[metric], rel=1e-4), (name, metric)
        assert found["held"] == "disk" and found["nbytes"] < simulated["nbytes"]
        assert found["load_s"] > 0 and found["tokens_per_s"] > 0


def test_the_reference_departs_from_itself_by_nothing_and_from_the_plan_by_much(mixed: Subject) -> None:
    found = run("reference", mixed)
    assert found["kl_nats_per_token"] == 0 and found["top1"] == 1
    assert found["max_logit_difference"] > 0.01
    whole = load_model(mixed.source, device=CPU)
    assert found["nbytes"] == 4 * sum(parameter.numel() for parameter in whole.parameters())


def test_gguf_is_near_and_timed_by_llama_cpp_alone(codes: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    found, simulated = run("gguf", codes), run("dequantised", codes)
    assert found["kl_nats_per_token"] == pytest.approx(simulated["kl_nats_per_token"], rel=0.2)
    assert pd.isna(found["tokens_per_s"])
    read: list[list[int]] = []
    llama = SimpleNamespace(reset=lambda: None, eval=read.append)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=lambda *_, **__: llama))
    assert run("gguf", codes)["tokens_per_s"] > 0
    assert read == [list(row) for row in TOKENS.loc[TOKENS["split"] == "report", "tokens"]]


@pytest.mark.parametrize("name", ["torchao_int8", "bitsandbytes_int8"])
def test_int8_is_near_the_reference_and_a_quarter_of_the_planned_weights(name: str, codes: Subject) -> None:
    found, simulated = run(name, codes), run("dequantised", codes)
    assert 0 < found["kl_nats_per_token"] < 0.1 * simulated["kl_nats_per_token"]
    coded = [row for row in codes.reader.plan.values() if row["quantizer"] != "none"]
    assert found["held"] == "memory"
    saved = sum(3 * row["rows"] * row["columns"] for row in coded)
    # beside 32-bit scales torchao keeps zeros of a byte a row, bitsandbytes a byte a matrix
    kept = sum(4 * row["rows"] + (row["rows"] if name == "torchao_int8" else 1) for row in coded)
    assert simulated["nbytes"] - found["nbytes"] == saved - kept


@pytest.mark.parametrize("name", ["torchao", "torchao_int8", "bitsandbytes_int8"])
def test_nothing_but_the_planned_matrices_is_touched(name: str, codes: Subject) -> None:
    source, found = load_model(codes.source, device=CPU), BACKENDS[name](codes).load()
    planned = {f"{layer}.weight": row for layer, row in codes.reader.plan.items() if row["quantizer"] != "none"}
    parameters = dict(found.named_parameters())
    for key, expected in source.named_parameters():
        same = type(parameters[key].data) is torch.Tensor and parameters[key].dtype == torch.float32
        assert same == (key not in planned), key
        assert key in planned or torch.equal(parameters[key], expected), key
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert any(key.endswith(".bias") for key in parameters)


def test_torchao_rounds_the_original_weights_to_the_plans_bits_and_groups(codes: Subject) -> None:
    source, found = load_model(codes.source, device=CPU), BACKENDS["torchao"](codes).load()
    for layer, row in codes.reader.plan.items():
        if row["quantizer"] == "none":
            continue
        W, Q = (m.get_submodule(layer).weight.detach() for m in (source, found))
        groups, codes_of = W.view(len(W), -1, 16), Q.dequantize().view(len(W), -1, 16)
        # the range of a group is stretched to hold zero
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2 ** row["bits"] - 1)
        assert ((groups - codes_of).abs() <= 1.01 * step[..., None]).all()
        assert max(len(group.unique()) for group in codes_of.flatten(0, 1)) <= 2 ** row["bits"]
        assert not torch.allclose(groups, codes_of)


def test_bitsandbytes_runs_a_plan_of_8_bits_and_one_scale_a_row(tmp_path: Path) -> None:
    found = run("bitsandbytes", subject(tmp_path, ROWS))
    assert found["status"] == MEASURED and 0 < found["max_logit_difference"] < 0.2


@pytest.mark.parametrize(
    ("name", "options", "family", "words"),
    [
        ("torchao", MIXED, "llama", r"has rank 2, .* native carries it"),
        ("torchao", (Option("rtn", 3, 20, 0),), "llama", r"32 inputs, no multiple of the group size 20; native"),
        ("torchao_int8", CODES, "gpt2", r"nn.Linear, which gpt2 has none of; native carries it"),
        ("bitsandbytes", CODES, "llama", r"rtn-2b-g16-r0 with zero points, not 8 symmetric bits .* native carries it"),
        ("bitsandbytes", (Option("rtn", 8, 16, 0, symmetric=True),), "llama", r"one scale a row; native carries it"),
        ("bitsandbytes_int8", CODES, "gpt2", r"which gpt2 has none of"),
        ("gptq", MIXED, "llama", r"has rank 2, which has no place here; export huggingface"),
        ("huggingface", CODES, "gpt2", r"not gpt2: use the native format"),
    ],
)
def test_what_cannot_carry_a_plan_says_so_and_what_can(
    name: str, options: Sequence[Option], family: str, words: str, tmp_path: Path
) -> None:
    of = subject(tmp_path, options, family)
    with pytest.raises(BitallocError, match=words) as refusal:
        BACKENDS[name](of)
    frame = measure(name, plan="p", subject=of, tokens=TOKENS, settings=SETTINGS)
    assert frame["status"].tolist() == [str(refusal.value)] and "\n" not in str(refusal.value)
    assert frame.drop(columns=["plan", "backend", "task", "status"]).isna().all(axis=None)
    TABLE.write(frame, tmp_path / "table.parquet")
    assert not list(of.scratch.iterdir())


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("torchao", "torchao", r"pip install 'bitalloc\[backends\]'"),
        ("bitsandbytes_int8", "bitsandbytes", r"pip install 'bitalloc\[backends\]'"),
        ("huggingface", "compressed_tensors", r"pip install 'bitalloc\[huggingface\]'"),
        ("gguf", "gguf", r"pip install 'bitalloc\[gguf\]'"),
        ("gptq", "gptqmodel", r"an environment of its own"),
    ],
)
def test_an_absent_library_is_a_row_with_the_remedy(
    name: str, module: str, remedy: str, words: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BitallocError, match=remedy):
        BACKENDS[name](words)
    assert run(name, words)["status"] != MEASURED


def test_a_gptq_checkpoint_is_written_for_gptqmodel(words: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is held to the same logits in tests/formats/test_gptq.py."""
    peer = ModuleType("gptqmodel")
    peer.BACKEND = SimpleNamespace(GPTQ_TORCH="torch")

    def load(folder: str, **how: Any) -> SimpleNamespace:
        assert (Path(folder) / "quantize_config.json").is_file() and how["backend"] == "torch"
        return SimpleNamespace(model=bitalloc.load_model(words.reader.folder, device=CPU).half())

    peer.GPTQModel = SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "gptqmodel", peer)
    found = run("gptq", words)
    assert found["status"] == MEASURED and 0 < found["max_logit_difference"] < 0.01
    assert found["nbytes"] == (words.scratch / "gptq" / "model.safetensors").stat().st_size


def test_a_backend_is_scored_with_the_head_that_it_has(mixed: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(mixed.source, device=CPU)
    model.lm_head.weight.data *= 1.5
    monkeypatch.setitem(backends.BACKENDS, "other", lambda _: Runnable(lambda: model))
    assert abs(run("reference", mixed)["kl_nats_per_token"]) < 1e-7
    assert run("other", mixed)["kl_nats_per_token"] > 0.001


def test_an_unknown_backend_is_one_line(mixed: Subject) -> None:
    with pytest.raises(BitallocError, match="did you mean 'huggingface'"):
        run("hugingface", mixed)


def test_the_configuration_names_every_backend() -> None:
    assert Backends().names == list(BACKENDS)


def test_the_figure_shows_what_ran_and_why_not(tmp_path: Path) -> None:
    rows = []
    for plan in ("best-2.3bpw", "bits_only-2.3bpw"):
        for task in ("world/report", "docstrings/report"):
            for place, name in enumerate(BACKENDS):
                row = {"plan": plan, "backend": name, "task": task, "status": "torchao: no place for rank; " * 9}
                if name not in {"gptq", "torchao"}:
                    kl, ppl = 0.1 + 0.01 * place, 4 + 0.1 * place
                    row |= {"status": MEASURED, "kl_nats_per_token": kl, "kl_lo": 0.9 * kl, "kl_hi": 1.1 * kl}
                    row |= {"ppl": ppl, "ppl_lo": ppl - 0.2, "ppl_hi": ppl + 0.3, "max_logit_difference": 1e-6}
                    row |= {"nbytes": 10**6, "held": "memory"}
                rows.append(row)
    frame = pd.DataFrame(rows, columns=TABLE.names)
    for name in "ab":
        figures.backends(frame, tmp_path / f"{name}.png", STAMP, model="tiny")
    drawn(tmp_path / "a.png", 13.5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    refused = frame[frame["backend"].isin(["gptq", "torchao"]) & (frame["plan"] == "best-2.3bpw")]
    figures.backends(refused, tmp_path / "none.png", STAMP, model="tiny")
    drawn(tmp_path / "none.png", 13.5)
