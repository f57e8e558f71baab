"""Schemes on a small random Mamba2, and on a Llama: `apply` is for any family of Linears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitalloc.errors import BitallocError
from bitalloc.models import load_model
from bitalloc.scheme import LADDER, Scheme
from bitalloc.schemes import Calibration, QuantLinear, application, apply, calls, scope
from bitalloc.schemes.folding import fold
from tests.random_models import BLOCKS, VOCABULARY, build

IDS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
LAYERS = [f"backbone.layers.{block}.mixer.{name}" for block in range(BLOCKS) for name in ("in_proj", "out_proj")]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def kl(name: str, family: str = "mamba2") -> float:
    model = build(family)
    log_p = logits(model).log_softmax(-1)
    apply(model, name, calibration=IDS)
    return float((log_p.exp() * (log_p - logits(model).log_softmax(-1))).sum(-1).mean())


# ---- scope -------------------------------------------------------------------------------------------
def test_scope_of_mamba2_is_its_two_projections_and_everything_else_has_a_reason() -> None:
    found = scope(build("mamba2"))
    assert [matrix.layer for matrix in found.matrices] == LAYERS
    out = {row["tensor"].removesuffix(".weight").rpartition(".")[2] for row in found.rows if not row["quantised"]}
    assert {"conv1d", "A_log", "D", "dt_bias", "norm", "norm_f", "embeddings", "lm_head"} <= out
    assert all(row["reason"] for row in found.rows)
    assert str(found).count("\n") == len(found.rows)
    assert found.digest == scope(build("mamba2", seed=1)).digest != scope(build("llama")).digest


def test_units_of_in_proj_are_the_row_blocks_that_the_mixer_splits() -> None:
    model = build("mamba2")
    matrix = scope(model).matrices[0]
    assert [unit.name.rpartition(".")[2] for unit in matrix.units] == ["z", "x", "B", "C", "dt"]
    sizes = [len(range(*unit.rows.indices(matrix.rows))) for unit in matrix.units]
    mixer = model.backbone.layers[0].mixer
    state = mixer.n_groups * mixer.ssm_state_size
    assert sizes == [mixer.intermediate_size, mixer.intermediate_size, state, state, mixer.num_heads]
    assert sum(sizes) == matrix.rows


# ---- every module is used ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["w8a8", "w8a8@torchao", "w4a4@compressed-tensors"])
def test_every_quantised_module_is_used_in_prefill_and_in_decode(name: str) -> None:
    model = build("mamba2")
    record = apply(model, name)
    with calls(model, record.layers) as prefill:
        logits(model)
    assert prefill == dict.fromkeys(LAYERS, 1)
    with calls(model, record.layers) as whole:
        model.generate(IDS[:2, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert whole == dict.fromkeys(LAYERS, 4)  # the prompt, and three tokens one at a time from the cache


def test_training_mode_where_kernels_read_weights_past_the_module_is_refused() -> None:
    model = build("mamba2")
    apply(model, "w8a8")
    with pytest.raises(BitallocError, match="training mode"):
        model.train()(IDS)


# ---- rotations ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("techniques", ["online", "folded", "online+folded"])
def test_rotations_change_nothing_without_rounding(techniques: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(application.DTYPE, "bf16", torch.float32)  # 16-bit "rounding" to float32: none
    model = build("mamba2")
    before = logits(model)
    record = apply(model, f"w16a16+{techniques}", seed=5)
    assert record.rotations == BLOCKS * ("online" in techniques)
    after = logits(model)
    assert (after - before).norm() < 1e-5 * before.norm()
    inner = model.backbone.layers[0].mixer.in_proj.weight
    assert torch.equal(inner, build("mamba2").backbone.layers[0].mixer.in_proj.weight) == ("folded" not in techniques)


def test_folding_separates_a_tied_head() -> None:
    model = build("mamba2")
    model.lm_head.weight = model.backbone.embeddings.weight
    before = logits(model)
    fold(model.requires_grad_(False), scope(model), seed=0)
    assert model.lm_head.weight is not model.backbone.embeddings.weight
    assert (logits(model) - before).norm() < 1e-5 * before.norm()


def test_rotation_saves_a_model_whose_out_proj_reads_an_outlier() -> None:
    def planted() -> torch.nn.Module:
        model = build("mamba2")
        for block in model.backbone.layers:  # one channel 60 times as large, with weights as much smaller
            block.mixer.norm.weight[5] *= 60
            block.mixer.out_proj.weight[:, 5] /= 60
        return model

    with torch.no_grad():
        before = logits(planted())
        errors = {}
        for name in ("w8a4", "w8a4+online"):
            model = planted()
            apply(model, name)
            errors[name] = float((logits(model) - before).norm())
    assert errors["w8a4+online"] < 0.7 * errors["w8a4"]  # .52 here


# ---- techniques --------------------------------------------------------------------------------------
def test_the_ladder_gets_worse_step_by_step() -> None:
    found = [kl(name) for name in LADDER]
    assert found == sorted(found)
    assert found[0] < 1e-4


def test_gptq_is_better_than_rounding_to_nearest_on_what_it_was_calibrated_on() -> None:
    assert kl("w3a16+gptq") < kl("w3a16")


@pytest.mark.parametrize("group_size", [None, 16])
def test_bytes_of_dp_are_at_most_those_of_uniform_and_its_bits_differ(group_size: int | None) -> None:
    records = [
        apply(build("mamba2"), Scheme.parse(name, group_size=group_size), calibration=IDS)
        for name in ("w4a8", "w4a8+dp")
    ]
    uniform, chosen = records
    assert 0.98 * uniform.nbytes < chosen.nbytes <= uniform.nbytes
    assert set(uniform.bits.values()) == {4} < set(chosen.bits.values()) <= set(range(2, 9))
    assert uniform.bits_per_weight == pytest.approx(4 + 16 / 16 if group_size else 4.4252, abs=1e-3)


def test_static_scale_clips_what_is_beyond_the_percentile() -> None:
    model = build("mamba2")
    apply(model, Scheme.parse("w16a8+static", percentile=90), calibration=IDS)
    module = model.backbone.layers[0].mixer.out_proj
    largest = module.activation.largest.item()
    rounded = module.activation(torch.tensor([[10 * largest, -10 * largest, 0.0]]))
    assert rounded.abs().max().item() == pytest.approx(largest, rel=0.01)


@pytest.mark.parametrize("name", ["w16a2", "w16a2+asym"])
def test_a_clipped_range_is_better_where_codes_are_few(name: str) -> None:
    errors = {}
    for technique in ("", "+clip"):
        model = build("mamba2")
        apply(model, name + technique, calibration=IDS)
        module = model.backbone.layers[0].mixer.out_proj
        x_TI = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        errors[technique] = float((module.activation(x_TI) - x_TI).square().mean())
    assert errors["+clip"] < errors[""]


def test_a_calibration_is_shared_and_a_rotated_stream_has_its_own() -> None:
    shared = Calibration(build("mamba2"), IDS)
    for name in ("w4a4+gptq+static", "w4a4+gptq+folded"):
        first, second = build("mamba2"), build("mamba2")
        apply(first, name, calibration=shared)
        apply(second, name, calibration=IDS)
        assert torch.equal(logits(first), logits(second))


def test_kept_outputs_are_those_of_the_original() -> None:
    model, x_TI = build("mamba2"), torch.randn(3, 32)
    expected = model.backbone.layers[0].mixer.in_proj(x_TI)
    apply(model, "w2a4", keep=True)
    module = model.backbone.layers[0].mixer.in_proj
    module.kept_O = torch.arange(module.out_features) < 10
    assert torch.equal(module(x_TI)[:, :10], expected[:, :10])
    assert not torch.isclose(module(x_TI)[:, 10:], expected[:, 10:]).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi"])
def test_any_family_of_linears(family: str) -> None:
    assert 0 < kl("w8a8+online", family) < kl("w4a4+rtn", family)


# ---- other software ----------------------------------------------------------------------------------
def both(name: str, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the original, of our simulation and of the library."""
    models = [build("mamba2") for _ in range(3)]
    apply(models[1], name, calibration=IDS)
    apply(models[2], f"{name}@{backend}", calibration=IDS)
    return tuple(logits(model) for model in models)


@pytest.mark.parametrize("name", ["w4a4", "w8a8", "w4a4+gptq", "w4a8+asym", "w4a4+static", "w4a4+folded"])
def test_simulation_is_compressed_tensors_to_the_last_digits(name: str) -> None:
    _, ours, theirs = both(name, "compressed-tensors")
    assert (ours - theirs).norm() < 1e-5 * ours.norm()


@pytest.mark.parametrize(("name", "difference"), [("w8a8", 0.03), ("w4a8+asym", 0.12)])
def test_simulation_is_near_torchao(name: str, difference: float) -> None:
    """Its scales are of 32 bits: the largest weight of a row lies half between two codes and may fall on the other.

    Measured: .016 and .069 of the logits' norm, where rounding costs .023 and .22.
    """
    before, ours, theirs = both(name, "torchao")
    assert (ours - theirs).norm() < difference * ours.norm()
    errors = [float((logits - before).norm()) for logits in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


def test_int_quantized_checkpoint_of_mamba2_loads_in_plain_transformers(tmp_path: Path) -> None:
    model, original = build("mamba2"), build("mamba2")
    apply(model, "w4a4@compressed-tensors")
    original.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    for layer in LAYERS:
        module = model.get_submodule(layer)
        tensors[f"{layer}.weight"] = (module.weight / module.weight_scale).round().to(torch.int8)
        tensors[f"{layer}.weight_scale"] = module.weight_scale.clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    four = {"num_bits": 4, "type": "int", "symmetric": True}
    group = {
        "targets": LAYERS,
        "weights": {**four, "strategy": "channel", "dynamic": False},
        "input_activations": {**four, "strategy": "token", "dynamic": True},
    }
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    raw["quantization_config"] = {**how, "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = load_model(tmp_path, device=torch.device("cpu"))
    assert (logits(loaded) - logits(model)).norm() < 1e-5 * logits(model).norm()
    assert (logits(original) - logits(model)).norm() > 0.1 * logits(model).norm()


def test_refusals_are_one_line() -> None:
    for name, reason in {
        "w4a4@torchao": "no W4A4",
        "w4a8@torchao": r"add \+asym",
        "w8a8+gptq@torchao": "itself",
        "w4a4+dp@compressed-tensors": "one width",
        "bf16@compressed-tensors": "integer",
    }.items():
        with pytest.raises(BitallocError, match=reason):
            apply(build("mamba2"), name, calibration=IDS)
    with pytest.raises(BitallocError, match="give token ids"):
        apply(build("mamba2"), "w4a4+gptq")
    with pytest.raises(BitallocError, match=r"no nn\.Linear"):
        apply(build("gpt2"), "w8a8")
    with pytest.raises(BitallocError, match="a scheme was applied"):
        twice = build("mamba2")
        apply(twice, "w8a8")
        apply(twice, "w4a4")
    with pytest.raises(BitallocError, match="not folded yet"):
        apply(build("llama"), "w8a8+folded")


@pytest.mark.parametrize(
    "name", ["w9a8", "4bit", "w4a4+gtpq", "w8a8@torcha", "w16a8+gptq", "w4a4+rtn+gptq", "w4a16+static"]
)
def test_names_that_say_nothing_are_refused(name: str) -> None:
    with pytest.raises(BitallocError):
        Scheme.parse(name)


def test_modules_are_quantlinears_and_bf16_models_stay_bf16() -> None:
    model = build("mamba2").to(torch.bfloat16)
    before = logits(model)
    apply(model, "w4a4+online")
    for layer in LAYERS:
        assert isinstance(model.get_submodule(layer), QuantLinear)
        assert model.get_submodule(layer).weight.dtype == torch.bfloat16
    assert logits(model).dtype == before.dtype
