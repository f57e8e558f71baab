from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes

from bitalloc import models
from bitalloc.config import Model
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.models import Checkpoint
from bitalloc.store import Store
from tests.random_models import BLOCKS, VOCABULARY, build, save

EVERY = pytest.mark.parametrize("name", list(FAMILIES))
CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "resources" / "tiny"
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def first_layer(name: str) -> str:
    return FAMILIES[name].layer(0, FAMILIES[name].roles[0])


# ---- checkpoints -------------------------------------------------------------------------------------
def test_shards_read_like_one_file(tmp_path: Path) -> None:
    known = FAMILIES["llama"]
    whole = Checkpoint(save("llama", tmp_path / "whole"), known)
    shards = Checkpoint(save("llama", tmp_path / "shards", max_shard_size="20KB"), known)
    assert len({shards.file(name) for name in shards.names}) > 2
    assert whole.names == shards.names
    assert all(torch.equal(whole.tensor(name), shards.tensor(name)) for name in whole.names)


@EVERY
def test_weight_is_oriented_as_the_layer_uses_it(name: str, tmp_path: Path) -> None:
    known, model = FAMILIES[name], build(name)
    checkpoint = Checkpoint(save(name, tmp_path), known)
    for role in known.roles:
        layer = model.get_submodule(known.layer(0, role))
        W_OI = checkpoint.weight(known.layer(0, role))
        x = torch.randn(5, W_OI.shape[1])
        torch.testing.assert_close(layer(x), x @ W_OI.T + (0 if layer.bias is None else layer.bias))
        assert W_OI.is_contiguous()
        assert torch.equal(W_OI, models.get_weight(model, known, known.layer(0, role)))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_the_base_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(name, tmp_path), FAMILIES[name])
    tensors = load_file(tmp_path / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({key.removeprefix(prefix): value for key, value in tensors.items()}, bare / "model.safetensors")
    found = Checkpoint(bare, FAMILIES[name])
    assert found.names == checkpoint.names
    assert torch.equal(found.weight(first_layer(name)), checkpoint.weight(first_layer(name)))


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    known = FAMILIES["llama"]

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(BitallocError, match=match) as caught:
            Checkpoint(folder, known)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "absent", "does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"no \.safetensors file; convert")
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(empty, r"only pickle files \(pytorch_model.bin\).*convert the weights")

    cut = save("llama", tmp_path / "cut") / "model.safetensors"
    for size in (cut.stat().st_size - 1, 100, 3, 0):
        cut.write_bytes(cut.read_bytes()[:size])
        refused(cut.parent, "model.safetensors is truncated or not safetensors.*fetch it again")

    shards = save("llama", tmp_path / "shards", max_shard_size="20KB")
    gone = next(shards.glob("model-00002*"))
    gone.rename(tmp_path / "elsewhere")
    refused(shards, f"names {gone.name}, which is missing")
    gone.write_bytes(to_bytes({"model.norm.weight": torch.zeros(3)}))
    refused(shards, f"in {gone.name}, which lacks it")
    (shards / models.INDEX).write_text("{")
    refused(shards, "is not an index")
    (shards / models.INDEX).unlink()
    refused(shards, "several .safetensors files but no")


def test_missing_tensor_and_nan_are_one_line(tmp_path: Path) -> None:
    layer = first_layer("llama")
    file = save("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    with pytest.raises(BitallocError, match=r"has no tensor 'model\.layers\.9"):
        Checkpoint(tmp_path, FAMILIES["llama"]).weight("model.layers.9.mlp.up_proj")
    for value in (float("nan"), float("-inf")):
        tensors[f"{layer}.weight"][1, 2] = value
        save_file(tensors, file)
        with pytest.raises(BitallocError, match=rf"{layer}.weight of .* holds NaN or Inf"):
            Checkpoint(tmp_path, FAMILIES["llama"]).weight(layer)


def test_open_checkpoint(tmp_path: Path) -> None:
    where = tmp_path / "checkpoint.json"
    where.write_text(json.dumps({"path": str(TINY), "family": "qwen2"}))
    checkpoint = models.open_checkpoint(where)
    assert (checkpoint.path, checkpoint.family) == (TINY, FAMILIES["qwen2"])
    for text in ("", "[]", '{"path": "x"}'):
        where.write_text(text)
        with pytest.raises(BitallocError, match="does not say where the checkpoint lies"):
            models.open_checkpoint(where)


# ---- configuration -----------------------------------------------------------------------------------
@EVERY
def test_check_config(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    models.check_config("m", tmp_path, Model(path="x", family=name, blocks=BLOCKS))
    context = None if name == "mamba2" else 64  # a state has no end
    assert models.context_length(models.read_config(tmp_path)) == context
    with pytest.raises(BitallocError, match=f"model m: the sheet says 7 blocks, .* says {BLOCKS}"):
        models.check_config("m", tmp_path, Model(path="x", family=name, blocks=7))
    other = "gpt2" if name != "gpt2" else "llama"
    with pytest.raises(BitallocError, match=f"the sheet says family '{other}', .* says {name}"):
        models.check_config("m", tmp_path, Model(path="x", family=other, blocks=BLOCKS))


def test_check_config_refuses_another_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(BitallocError, match="LlamaForSequenceClassification; correct `family`"):
        models.check_config("m", tmp_path, Model(path="x", family="llama", blocks=BLOCKS))


@pytest.mark.parametrize(("text", "match"), [(None, "is missing"), ("{", "cannot be read"), ("[]", "is not a model")])
def test_bad_config_is_one_line(text: str | None, match: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BitallocError, match=match):
        models.read_config(tmp_path)


# ---- whole models ------------------------------------------------------------------------------------
def test_load_model_is_silent_float32_and_evaluates(capfd: pytest.CaptureFixture[str]) -> None:
    model = models.load_model(TINY, device=CPU)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert capfd.readouterr() == ("", "")


def test_load_model_reports_one_line(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BitallocError, match="transformers cannot load") as caught:
        models.load_model(tmp_path, device=CPU)
    assert "\n" not in str(caught.value)


@EVERY
def test_set_weight_keeps_type_and_changes_that_matrix_alone(name: str) -> None:
    known, model, layer = FAMILIES[name], build(name).half(), first_layer(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    W_OI = models.get_weight(model, known, layer)
    assert W_OI.dtype == torch.float32
    models.set_weight(model, known, layer, W_OI * 2)
    torch.testing.assert_close(models.get_weight(model, known, layer), W_OI * 2)
    after = model.state_dict()
    assert [key for key in after if not torch.equal(after[key], before[key])] == [f"{layer}.weight"]
    assert after[f"{layer}.weight"].dtype == torch.float16
    with pytest.raises(ValueError, match=layer):
        models.set_weight(model, known, layer, W_OI[:1])


def test_get_weight_is_a_copy() -> None:
    model = build("llama")
    models.get_weight(model, FAMILIES["llama"], first_layer("llama")).zero_()
    assert models.get_weight(model, FAMILIES["llama"], first_layer("llama")).any()


def test_pick_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick_device("auto") == models.pick_device("cpu") == CPU
    with pytest.raises(BitallocError, match="no GPU here; set `device: cpu`"):
        models.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.pick_device("auto") == torch.device("cuda")


# ---- models larger than memory -----------------------------------------------------------------------
@EVERY
def test_skeleton_filled_block_by_block_equals_the_model(name: str, tmp_path: Path) -> None:
    known = FAMILIES[name]
    checkpoint = Checkpoint(save(name, tmp_path), known)
    hollow = models.skeleton(tmp_path, device=CPU)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert not any(buffer.is_meta for buffer in hollow.buffers())
    blocks = hollow.get_submodule(known.blocks)
    models.materialise(blocks[1], f"{known.blocks}.1", checkpoint, device=CPU, dtype=torch.float32)
    whole = models.load_model(tmp_path, device=CPU).get_submodule(known.blocks)[1].state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in blocks[1].state_dict().items())
    assert all(parameter.is_meta for parameter in blocks[0].parameters())
    models.drop(blocks[1])
    assert all(parameter.is_meta for parameter in hollow.parameters())


def test_materialise_refuses_another_shape(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save("llama", tmp_path), FAMILIES["llama"])
    raw = models.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 40}))
    hollow = models.skeleton(tmp_path, device=CPU)
    with pytest.raises(BitallocError, match=r"mlp\.gate_proj\.weight' is \[48, 32\], config.json makes it \[40, 32\]"):
        models.materialise(hollow.model, "model", checkpoint, device=CPU, dtype=torch.float32)


# ---- moments -----------------------------------------------------------------------------------------
def test_read_moment_trusts_sound_shards_only(tmp_path: Path) -> None:
    store, H_II = Store(tmp_path), torch.eye(3)
    store.put("ab" * 32, {}, to_bytes({"H_II": H_II}))
    assert torch.equal(models.read_moment(store, "ab" * 32), H_II)
    path = store.path("ab" * 32, ".safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    for key in ("ab" * 32, "cd" * 32):
        with pytest.raises(BitallocError, match=r"delete moments\.parquet and rerun"):
            models.read_moment(store, key)
