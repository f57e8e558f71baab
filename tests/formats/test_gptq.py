"""GPTQ: the codes as they are; GPTQModel, where it is, computes what the native checkpoint computes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.formats import bitalloc, gptq
from bitalloc.option import Option, options
from tests.formats.test_bitalloc import save
from tests.random_models import CONFIGS
from tests.small import CPU, small

TINY = Path(__file__).parents[2] / "resources" / "tiny"
EVERY = Sweep(quantizers=["rtn"], bits=[2, 3, 4, 8, 16], group_sizes=[16, 32, 64, 128], ranks=[0])
SYMMETRIC = EVERY.model_copy(update={"symmetric": True})
IDS = torch.randint(0, 1024, (2, 12), generator=torch.Generator().manual_seed(0))


def wide(family: str, folder: Path, *, hidden: int = 128) -> Path:
    """A random model whose matrices pack into words, with a tokenizer."""
    shape = {"vocab_size": 1024, "hidden_size": hidden, "num_hidden_layers": 3, "num_attention_heads": 4}
    mlp = {"intermediate_size": 2 * hidden, "num_key_value_heads": 2}
    if family == "opt":
        mlp = {"ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(CONFIGS[family])(**shape, **mlp, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(TINY / name, folder / name)
    return folder


def checkpoint(
    folder: Path, sweep: Sweep, *, family: str = "qwen2", source: Path = TINY, chosen: tuple[Option, ...] = ()
) -> bitalloc.Reader:
    bench = small(family, folder, sweep=sweep, source=source)
    save(bench, folder / "plan", bench.plan(chosen or options(sweep)))
    return bitalloc.Reader(folder / "plan")


def bits_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words [n, rows] -> codes [32 n / bits, rows], bit by bit."""
    flat = (words.long()[:, None] >> torch.arange(32)[None, :, None] & 1).flatten(0, 1)
    return (flat.view(-1, bits, words.shape[1]) << torch.arange(bits)[None, :, None]).sum(1)


@pytest.mark.parametrize(("sweep", "version", "less"), [(EVERY, "gptq_v2", 0), (SYMMETRIC, "gptq", 1)])
def test_codes_and_zeros_come_back_bit_by_bit(sweep: Sweep, version: str, less: int, tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, sweep)
    gptq.save(tmp_path / "gptq", reader)
    weights = tmp_path / "gptq" / "model.safetensors"
    assert weights.stat().st_size == gptq.nbytes(reader)
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["checkpoint_format"] == version
    found, seen = load_file(weights), set()
    for layer in reader.plan:
        matrix = reader.matrix(layer)
        seen.add(matrix.option)
        if matrix.weight_OI is not None:
            assert torch.equal(found.pop(f"{layer}.weight"), matrix.weight_OI)
            continue
        parts = {name: found.pop(f"{layer}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx")}
        codes_IO = bits_of(parts["qweight"], matrix.option.bits)
        zeros_GO = bits_of(parts["qzeros"].T, matrix.option.bits).T + less
        group = parts["g_idx"].long()
        What_IO = (codes_IO - zeros_GO[group]).float() * parts["scales"].float()[group]
        assert torch.equal(What_IO.T, matrix.dequantize())
    assert seen == set(options(sweep))
    assert found.keys() == reader.untouched().keys()
    assert all(torch.equal(tensor, reader.tensor(name)) for name, tensor in found.items())


def test_what_departs_from_the_most_common_scheme_is_named_and_the_folder_is_whole(tmp_path: Path) -> None:
    common, other, whole = Option("rtn", 4, 64, 0), Option("rtn", 3, 32, 0), Option("none", 16, 0, 0)
    reader = checkpoint(tmp_path, EVERY, chosen=(common, common, common, other, common, whole))
    gptq.save(tmp_path / "gptq", reader, card="# a plan\n")
    settings = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"]) == (4, 64)
    dynamic, layers = settings["dynamic"], list(reader.plan)
    assert dynamic["+:^" + layers[3].replace(".", r"\.") + "$"] == {"bits": 3, "group_size": 32}
    assert dynamic["-:^" + layers[5].replace(".", r"\.") + "$"] == {}
    assert len(dynamic) == sum(place % 6 in (3, 5) for place in range(len(layers)))
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"] == settings
    assert (tmp_path / "gptq" / "README.md").read_text() == "# a plan\n"
    names = "README.md config.json generation_config.json model.safetensors quantize_config.json tokenizer.json"
    assert sorted(path.name for path in (tmp_path / "gptq").iterdir()) == [*names.split(), "tokenizer_config.json"]


def test_one_group_for_a_row_has_no_size(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, EVERY, chosen=(Option("rtn", 4, 512, 0),))
    assert gptq._settings(reader)["group_size"] == -1
    gptq.refuse(reader)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (Option("rtn", 5, 32, 0), r"has 5 bits, which is none of \(2, 3, 4, 8\); the native checkpoint"),
        (Option("rtn", 2, 32, 2), r"has rank 2, .* export huggingface"),
        (Option("rtn", 4, 96, 0), r"has groups of 96, not one of .* native checkpoint"),
        (Option("rtn", 4, 256, 0), r"has 384 inputs, not full groups of 256; the native"),
        (Option("none", 16, 0, 0), r"no matrix of this plan has codes"),
    ],
)
def test_what_it_cannot_carry_is_refused(option: Option, reason: str, tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, EVERY, chosen=(option,))
    with pytest.raises(BitallocError, match=reason) as caught:
        gptq.save(tmp_path / "gptq", reader)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gptq").exists()


def test_shapes_that_do_not_fill_words_and_other_families_are_refused(tmp_path: Path) -> None:
    narrow = small("llama", tmp_path / "a", sweep=EVERY)
    save(narrow, tmp_path / "a" / "plan", narrow.plan([Option("rtn", 3, 16, 0)]))
    with pytest.raises(BitallocError, match=r"16 x 32, which 3-bit codes do not pack into words \(multiples of 32\)"):
        gptq.nbytes(bitalloc.Reader(tmp_path / "a" / "plan"))
    transposed = small("gpt2", tmp_path / "b", sweep=EVERY)
    save(transposed, tmp_path / "b" / "plan", transposed.plan([Option("rtn", 4, 16, 0)]))
    with pytest.raises(BitallocError, match=r"family 'gpt2' is not written \(llama, .*native checkpoint"):
        gptq.nbytes(bitalloc.Reader(tmp_path / "b" / "plan"))


PEER = """
import json, sys, torch
from gptqmodel import BACKEND, GPTQModel
found = {}
for name, folder, ids in json.loads(sys.argv[1]):
    # only half precision loads; the kernel then computes in the type of what it is given
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.float()
    with torch.inference_mode():
        found[name] = model(torch.tensor(ids)).logits
torch.save(found, sys.argv[2])
"""


def test_gptqmodel_computes_the_same_logits(tmp_path: Path) -> None:
    if not (python := os.environ.get("BITALLOC_GPTQMODEL")):
        pytest.skip("BITALLOC_GPTQMODEL is not set: the path of a Python that has GPTQModel")
    jobs: list[tuple[str, str, Any]] = []
    expected = {}
    for family in gptq.FAMILIES:
        for sweep in (EVERY, SYMMETRIC):
            name = f"{family}-{'symmetric' if sweep.symmetric else 'zeros'}"
            source = wide(family, tmp_path / name / "wide")
            reader = checkpoint(tmp_path / name, sweep, family=family, source=source)
            gptq.save(tmp_path / name / "gptq", reader)
            jobs.append((name, str(tmp_path / name / "gptq"), IDS.tolist()))
            with torch.inference_mode():
                expected[name] = bitalloc.load_model(reader.folder, device=CPU)(IDS).logits
    # compiling takes half a minute and changes nothing that is asked here
    environment = {**os.environ, "PYTHONPATH": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "2"}
    command = [python, "-c", PEER, json.dumps(jobs), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")
