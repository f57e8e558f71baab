from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.formats import bitalloc
from bitalloc.formats.layout import checkpoint_nbytes
from bitalloc.models import get_weight, load_model, set_weight
from bitalloc.option import from_row
from tests.random_models import VOCABULARY
from tests.small import CPU, OPTIONS, Small, small

EVERY = pytest.mark.parametrize("family", list(FAMILIES))
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def save(bench: Small, folder: Path, plan: pd.DataFrame | None = None, **extra: object) -> pd.DataFrame:
    plan = bench.plan(OPTIONS) if plan is None else plan
    bitalloc.save(
        folder,
        source=bench.experiments.checkpoint,
        inventory=bench.inventory,
        plan=plan,
        matrix=bench.experiments.matrix,
        sweep=bench.experiments.sweep,
        extra=extra,
    )
    return plan


@EVERY
def test_round_trip_is_exact_and_the_size_is_as_promised(family: str, tmp_path: Path) -> None:
    bench, folder = small(family, tmp_path), tmp_path / "checkpoint"
    plan = save(bench, folder)
    found, matrix = bitalloc.load(folder, inventory=bench.inventory)
    pd.testing.assert_frame_equal(found, plan)
    model, source = bitalloc.load_model(folder, device=CPU), load_model(bench.path, device=CPU)
    for row in plan.to_dict("records"):
        made = bench.experiments.matrix(row["layer"], from_row(row, bench.experiments.sweep))
        What_OI = made.dequantize()
        assert torch.equal(matrix(row["layer"]).dequantize(), What_OI)
        assert torch.equal(get_weight(model, FAMILIES[family], row["layer"]), What_OI)
        assert all(torch.equal(a, made.tensors()[name]) for name, a in matrix(row["layer"]).tensors().items())
        set_weight(source, FAMILIES[family], row["layer"], What_OI)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, source(IDS).logits)  # and so is everything else
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert on_disk == checkpoint_nbytes(bench.inventory, plan, bench.experiments.sweep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sweep", [{"symmetric": True}, {"factor_bits": 16}])
def test_other_types_and_options_come_back_too(dtype: torch.dtype, sweep: dict, tmp_path: Path) -> None:
    settings = Sweep(quantizers=["rtn"], bits=[2, 3, 16], group_sizes=[16], ranks=[0, 2], **sweep)
    bench, folder = small("llama", tmp_path, dtype=dtype, sweep=settings), tmp_path / "checkpoint"
    plan = save(bench, folder)
    _, matrix = bitalloc.load(folder)
    for row in plan.to_dict("records"):
        made = bench.experiments.matrix(row["layer"], from_row(row, settings))
        assert torch.equal(matrix(row["layer"]).dequantize(), made.dequantize())
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert on_disk == checkpoint_nbytes(bench.inventory, plan, settings)


def test_small_files_and_what_the_caller_adds_travel_along(tmp_path: Path) -> None:
    bench, folder = small("llama", tmp_path), tmp_path / "checkpoint"
    (bench.path / "tokenizer.json").write_text("{}")
    (bench.path / "model.safetensors.index.json").write_text("{}")
    plan = save(bench, folder, verdicts=[{"gate": "g", "go": True}])
    before, config = (json.loads((path / "config.json").read_text()) for path in (bench.path, folder))
    packing = config.pop("quantization_config")
    assert config == before and list(packing["layers"]) == sorted(plan["layer"])
    assert (folder / "tokenizer.json").is_file()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in (path.name for path in folder.glob("*.safetensors")):
        with safe_open(folder / file, framework="pt") as handle:
            assert set(handle.keys()) == {name for name, where in index["weight_map"].items() if where == file}
    assert json.loads((folder / "bitalloc.json").read_text())["extra"] == {"verdicts": [{"gate": "g", "go": True}]}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_equal_checkpoint_is_kept_and_another_one_refused(tmp_path: Path) -> None:
    bench, folder = small("llama", tmp_path), tmp_path / "checkpoint"
    save(bench, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    save(bench, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(BitallocError, match="holds another plan or model; delete it"):
        save(bench, folder, bench.plan(OPTIONS[:1]))


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    bench, folder = small("llama", tmp_path), tmp_path / "checkpoint"
    last = bench.layers[-1]

    def full(layer: str, option: object) -> object:
        if layer == last:
            raise OSError(28, "No space left on device")
        return bench.experiments.matrix(layer, option)

    with pytest.raises(BitallocError, match=r"cannot write .*: No space left on device; free space"):
        bitalloc.save(
            folder,
            source=bench.experiments.checkpoint,
            inventory=bench.inventory,
            plan=bench.plan(OPTIONS),
            matrix=full,
            sweep=bench.experiments.sweep,
            extra={},
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "store"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["block-00001.safetensors", "rest.safetensors", "bitalloc.json"])
def test_a_damaged_checkpoint_is_refused(file: str, harm: Callable[[Path], None], tmp_path: Path) -> None:
    bench, folder = small("llama", tmp_path), tmp_path / "checkpoint"
    save(bench, folder)
    harm(folder / file)
    with pytest.raises(BitallocError, match=rf"{file} is missing, .*damaged.*delete the folder") as caught:
        bitalloc.load_model(folder, device=CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(BitallocError, match=file):
        save(bench, folder)  # nor is it taken for the finished one


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    bench, other = small("llama", tmp_path / "a"), small("llama", tmp_path / "b", seed=1)
    save(bench, tmp_path / "checkpoint")
    with pytest.raises(BitallocError, match="compressed from another model"):
        bitalloc.load(tmp_path / "checkpoint", inventory=other.inventory)


def test_two_checkpoints_of_one_plan_are_equal_byte_for_byte(tmp_path: Path) -> None:
    bench = small("gpt2", tmp_path)
    for name in ("one", "two"):
        save(bench, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert bitalloc.checkpoint_digest(tmp_path / "one") == bitalloc.checkpoint_digest(tmp_path / "two")
