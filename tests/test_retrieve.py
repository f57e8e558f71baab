from __future__ import annotations

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from bitalloc import config, retrieve, tables
from bitalloc.corpus import load_tokenizer
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from tests.random_models import BLOCKS, save

TINY = Path(__file__).parents[1] / "resources" / "tiny"


BOTH = ["world", "docstrings"]
SETTINGS = config.parse(
    {
        "retrieve": {
            "calibrate": BOTH, "select": BOTH, "report": BOTH, "window": 256, "calibrate_windows": 64,
            "select_windows": 24, "report_windows": 24,
            "items": {"facts": 384, "sums": 50, "keys": 300, "passkey": 300},
        }
    }
)  # fmt: skip


# ---- resolve -----------------------------------------------------------------------------------------
def test_local_folder_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setenv("SOME_FOLDER", str(TINY.parent))
    model = config.Model(path="${SOME_FOLDER}/tiny", hub="org/tiny", family="qwen2", blocks=4)
    assert retrieve.resolve("tiny", model) == (TINY, "local")


def test_hub_with_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, asked = tmp_path / "snapshots" / "0123abc", {}

    def download(repo: str, **where: object) -> str:
        asked.update(where, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    save("gpt2", snapshot)
    model = config.Model(path="${NO_SUCH_DATA}/x", hub="org/gpt2", revision="v2", family="gpt2", blocks=BLOCKS)
    assert retrieve.resolve("g", model) == (snapshot, "0123abc")
    assert (asked["repo"], asked["revision"]) == ("org/gpt2", "v2")
    assert not any(pattern.endswith((".bin", ".pt", "*")) and pattern != "tokenizer*" for pattern in retrieve.FILES)
    with pytest.raises(BitallocError, match=f"the sheet says 9 blocks, .* says {BLOCKS}"):
        retrieve.resolve("g", model.model_copy(update={"blocks": 9}))


def test_not_to_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("hf_secret")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.delenv("NO_SUCH_DATA", raising=False)
    model = config.Model(path="${NO_SUCH_DATA}/x", hub="org/m", family="gpt2", blocks=3)
    with pytest.raises(BitallocError) as caught:
        retrieve.resolve("m", model)
    assert str(caught.value) == (
        "model m: tried ${NO_SUCH_DATA}/x (an environment variable is not set), "
        "org/m@main on the hub (not in the cache, and the hub cannot be reached); "
        "point to a copy: --config 'models={m: {path: /your/copy}}'"
    )


# ---- inventory ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(FAMILIES))
def test_inventory_is_total_and_true(name: str, tmp_path: Path) -> None:
    known, stored = FAMILIES[name], load_file(save(name, tmp_path) / "model.safetensors")
    table = retrieve.inventory("m", tmp_path, known)
    tables.INVENTORY.write(table, tmp_path / "inventory.parquet")
    assert set(table["tensor"]) == set(stored)
    for row in table.itertuples():
        tensor = stored[row.tensor]
        assert row.rows * row.columns == tensor.numel()
        assert row.nbytes == tensor.numel() * tensor.element_size()
        assert row.digest == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        if row.claimed:
            shape = tensor.T.shape if known.transposed else tensor.shape
            assert (row.rows, row.columns) == tuple(shape)
            assert row.layer == known.layer(row.block, next(r for r in known.roles if r.name == row.role))
            assert not row.reason
        else:
            assert row.reason
            assert (row.block >= 0) == row.tensor.startswith(known.blocks + ".")
    claimed = table[table["claimed"]]
    assert list(claimed["role"]) == [role.name for role in known.roles] * BLOCKS
    assert claimed["site"].nunique() == len(known.sites()) * BLOCKS
    assert not table["tied"].any()


def test_tied_head_is_tied_only_when_equal(tmp_path: Path) -> None:
    file = save("qwen2", tmp_path) / "model.safetensors"
    tensors = load_file(file)

    def tied(head: torch.Tensor, **settings: bool) -> list[str]:
        save_file({**tensors, "lm_head.weight": head.clone()}, file)
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | settings))
        table = retrieve.inventory("m", tmp_path, FAMILIES["qwen2"])
        return list(table.loc[table["tied"], "tensor"])

    embedding = tensors["model.embed_tokens.weight"]
    assert tied(embedding) == ["lm_head.weight"]
    assert tied(embedding + 1) == []
    assert tied(embedding, tie_word_embeddings=False) == []


def test_damaged_checkpoints_are_one_line(tmp_path: Path) -> None:
    known, file = FAMILIES["llama"], save("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.1.mlp.up_proj.weight"

    def refused(changed: dict[str, torch.Tensor], match: str) -> None:
        save_file(changed, file)
        with pytest.raises(BitallocError, match=match):
            retrieve.inventory("m", tmp_path, known)

    refused({**tensors, layer: tensors[layer] * float("nan")}, rf"{layer} of .* holds NaN or Inf")
    refused({**tensors, "model.layers.1.mlp.router.weight": torch.ones(2, 2)}, "neither claims nor excludes")
    refused({name: value for name, value in tensors.items() if name != layer}, f"lacks {layer}; fetch it again")


def test_inventory_of_tiny_is_golden() -> None:
    table = retrieve.inventory("tiny", TINY, FAMILIES["qwen2"])
    claimed = table[table["claimed"]]
    assert len(claimed) == 28
    assert (claimed["rows"] * claimed["columns"]).sum() == 786_432
    assert table["nbytes"].sum() == 1_839_360
    assert set(table["dtype"]) == {"float16"}


# ---- items and tokens --------------------------------------------------------------------------------
def test_items_of_tiny(tmp_path: Path) -> None:
    table = retrieve.items(SETTINGS, TINY)
    tables.ITEMS.write(table, tmp_path / "items.parquet")
    assert table.groupby("task").size().to_dict() == {
        "facts": 285, "facts_held_out": 99, "keys": 300, "passkey": 300, "sums": 50,
    }  # fmt: skip
    chance = table.groupby("task")["chance"].unique().map(list).to_dict()
    assert chance == {"facts": [0.25], "facts_held_out": [0.25], "keys": [0.01], "passkey": [0.01], "sums": [0.01]}
    assert (table["prompt"].map(lambda prompt: prompt[0]) == 0).all()
    assert table["prompt"].map(tuple).is_unique
    tokenizer = load_tokenizer(TINY)
    for row in table.itertuples():
        # the split between prompt and choice is one that the tokenizer makes itself
        right = row.choices[row.answer]
        assert tokenizer.encode(tokenizer.decode(row.prompt[1:] + right)).ids == row.prompt[1:] + right
    assert retrieve.items(SETTINGS, TINY).equals(table)
    assert set(table.loc[table["task"] == "facts", "group"]) == {"en", "he", "ar", "zh"}


def test_items_are_empty_without_any(tmp_path: Path) -> None:
    table = retrieve.items(config.Config(), TINY)
    tables.ITEMS.write(table, tmp_path / "items.parquet")
    assert tables.ITEMS.read(tmp_path / "items.parquet").empty


def test_bad_items_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BitallocError, match="unknown task 'fact': did you mean 'facts'"):
        retrieve.items(config.parse({"retrieve": {"items": {"fact": 3}}}), TINY)
    (tmp_path / "tokenizer.json").write_text((TINY / "tokenizer.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 40, "bos_token_id": 0}))
    with pytest.raises(BitallocError, match=r"an item of keys takes \d+ tokens, the model 40; leave keys out"):
        retrieve.items(config.parse({"retrieve": {"items": {"keys": 9}}}), tmp_path)


def test_tokens_are_those_of_the_configuration(tmp_path: Path) -> None:
    table = retrieve.tokens(SETTINGS, TINY)
    tables.TOKENS.write(table, tmp_path / "tokens.parquet")
    assert table.groupby("split").size().to_dict() == {"calibrate": 64, "select": 48, "report": 48}
