from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from pathlib import Path

import pandas as pd
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.export import export
from bitalloc.formats import bitalloc, huggingface
from bitalloc.option import Option
from tests.formats.test_packed import refused
from tests.random_models import VOCABULARY
from tests.small import CPU, Small, small

IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
BITS = [2, 3, 4, 8, 16]


def sweep(**settings: object) -> Sweep:
    return Sweep(quantizers=["rtn"], bits=BITS, group_sizes=[16], ranks=[0, 2], **settings)


def plan(bench: Small) -> pd.DataFrame:
    """Every number of bits, with rank and without, and one matrix as it is."""
    how = {"factor_bits": bench.experiments.sweep.factor_bits, "symmetric": bench.experiments.sweep.symmetric}
    coded = [Option("rtn", bits, 16, rank, **how) for bits, rank in ((2, 0), (3, 2), (4, 0), (8, 2), (2, 4), (3, 0))]
    return bench.plan([*coded, Option("none", 16, 0, 0)])


def native(family: str, folder: Path, chosen: pd.DataFrame | None = None, **settings: object) -> Path:
    bench = small(family, folder, sweep=sweep(**settings))
    bitalloc.save(
        folder / "native",
        source=bench.experiments.checkpoint,
        inventory=bench.inventory,
        plan=plan(bench) if chosen is None else chosen,
        matrix=bench.experiments.matrix,
        sweep=bench.experiments.sweep,
        extra={},
    )
    return folder / "native"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that has the libraries and does not know this package."""
    place = tmp_path_factory.mktemp("stranger")
    venv.create(place, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    # a path in a .pth file is searched, but the .pth files there are not run: an editable install stays unseen
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "python"


def test_a_stranger_computes_the_same_logits_and_is_refused_our_own_format(stranger: Path, tmp_path: Path) -> None:
    cases = {
        "llama": {},
        "qwen2": {"factor_bits": 16, "symmetric": True},
        "mistral": {"factor_bits": 16},
    }
    expected, targets = {}, []
    for family, settings in cases.items():
        source = native(family, tmp_path / family, **settings)
        targets.append(tmp_path / f"{family}-exported")
        export(source, targets[-1], name="huggingface")
        with torch.inference_mode():
            expected[targets[-1]] = bitalloc.load_model(source, device=CPU)(IDS).logits
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    script = Path(__file__).with_name("stranger.py")
    unreadable = refused(tmp_path / "refused")
    command = [stranger, "-I", script, tmp_path / "ids.safetensors", *targets, "--refused", *unreadable]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    assert done.stdout.split() == ["RuntimeError"] * len(unreadable)
    assert "Unknown quantization type, got bitalloc" in done.stderr
    for target, logits in expected.items():
        found = load_file(target.with_name(f"{target.name}.safetensors"))["logits"]
        assert float((found - logits).abs().max()) < 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("settings", [{}, {"symmetric": True, "factor_bits": 16}])
def test_the_size_is_known_before_and_codes_are_packed_as_the_library_packs(settings: dict, tmp_path: Path) -> None:
    source = native("llama", tmp_path, **settings)
    reader = bitalloc.Reader(source)
    row = export(source, tmp_path / "out", name="huggingface").iloc[0]
    files = [*(tmp_path / "out").rglob("*.safetensors"), tmp_path / "out" / "model.safetensors.index.json"]
    assert row["predicted_nbytes"] == row["nbytes"] == sum(file.stat().st_size for file in files)
    index = json.loads(files[-1].read_text())
    stored = {file: load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, tensors in stored.items() for name in tensors} == index["weight_map"]
    for layer, chosen in reader.plan.items():
        if chosen["quantizer"] == "none":
            continue
        matrix = reader.matrix(layer)
        tensors = stored[index["weight_map"][f"{layer}.weight_packed"]]
        codes = (matrix.codes_OI.int() - 2 ** (chosen["bits"] - 1)).to(torch.int8)
        assert torch.equal(tensors[f"{layer}.weight_packed"], pack_to_int32(codes, chosen["bits"]))
        assert torch.equal(tensors[f"{layer}.weight_scale"], matrix.scale_OG)
        if matrix.zero_OG is not None:
            zero = (matrix.zero_OG.int() - 2 ** (chosen["bits"] - 1)).to(torch.int8)
            assert torch.equal(tensors[f"{layer}.weight_zero_point"], pack_to_int32(zero, chosen["bits"], 0))


@pytest.mark.parametrize("factor_bits", [8, 16])
def test_factors_are_exact(factor_bits: int, tmp_path: Path) -> None:
    source = native("llama", tmp_path, factor_bits=factor_bits)
    export(source, tmp_path / "out", name="huggingface")
    adapter, reader = load_file(tmp_path / "out" / huggingface.ADAPTER), bitalloc.Reader(source)
    for layer in [layer for layer, row in reader.plan.items() if row["rank"]]:
        A_RI, B_OR = (adapter.pop(f"base_model.model.{layer}.lora_{part}.weight").double() for part in "AB")
        expected = reader.matrix(layer).lowrank_part().double()
        assert float((B_OR @ A_RI - expected).norm()) < 1e-6 * float(expected.norm())
    assert not adapter


def test_ranks_and_scales_are_given_to_each_matrix(tmp_path: Path) -> None:
    reader = bitalloc.Reader(native("llama", tmp_path))
    found = huggingface.adapter_config(reader)
    ranks = {layer: row["rank"] for layer, row in reader.plan.items() if row["rank"]}
    assert {layer: found["rank_pattern"].get(layer, found["r"]) for layer in found["target_modules"]} == ranks
    assert found["alpha_pattern"] == found["rank_pattern"] and found["lora_alpha"] == found["r"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi"])
def test_other_families_are_refused_with_the_format_that_can(family: str, tmp_path: Path) -> None:
    source = native(family, tmp_path)
    with pytest.raises(BitallocError, match=rf"not {family}: use the native format"):
        export(source, tmp_path / "out", name="huggingface")
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path: Path) -> None:
    bench = small("llama", tmp_path, sweep=Sweep(quantizers=["rtn"], group_sizes=[20], ranks=[0]))
    source = native("llama", tmp_path / "other", chosen=bench.plan([Option("rtn", 3, 20, 0)]))
    with pytest.raises(BitallocError, match=r"no multiple of the group size 20, or use the native"):
        export(source, tmp_path / "out", name="huggingface")


def test_bits_that_servers_do_not_read_are_refused(tmp_path: Path) -> None:
    bench = small("llama", tmp_path, sweep=Sweep(quantizers=["rtn"], bits=[6], group_sizes=[16], ranks=[0]))
    source = native("llama", tmp_path / "other", chosen=bench.plan([Option("rtn", 6, 16, 0)]))
    with pytest.raises(BitallocError, match=r"has 6 bits, which is none of \(2, 3, 4, 8\), or use the native"):
        export(source, tmp_path / "out", name="huggingface")


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = native("llama", tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(BitallocError, match="exists; delete it or write elsewhere"):
        export(source, tmp_path / "taken", name="huggingface")
    with pytest.raises(BitallocError, match=r"unknown format 'hugingface'.*huggingface"):
        export(source, tmp_path / "out", name="hugingface")
    size = export(source, tmp_path / "out", name="huggingface")["nbytes"].item()
    with pytest.raises(BitallocError, match=rf"takes {size} bytes as huggingface, 1 above its budget of {size - 1};"):
        export(source, tmp_path / "less", name="huggingface", limit=size - 1)
    block = source / "block-00001.safetensors"
    whole = block.read_bytes()
    for damaged in (whole[:-1], bytes([*whole[:-1], whole[-1] ^ 1])):
        block.write_bytes(damaged)
        with pytest.raises(BitallocError, match=r"block-00001\.safetensors is missing, truncated or damaged"):
            export(source, tmp_path / "broken", name="huggingface")
    with pytest.raises(BitallocError, match=r"bitalloc\.json is missing"):
        export(tmp_path, tmp_path / "nothing", name="huggingface")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "store", "native", "taken", "out"}
