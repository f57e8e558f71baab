"""GGUF: codes come through, transformers and (where it is) llama.cpp compute what the native checkpoint computes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitalloc.config import Sweep
from bitalloc.corpus import read_records, world_documents
from bitalloc.errors import BitallocError
from bitalloc.families import FAMILIES
from bitalloc.formats import bitalloc, gguf
from bitalloc.models import set_weight
from bitalloc.option import Option, options
from tests.formats.test_bitalloc import save
from tests.formats.test_gptq import wide
from tests.random_models import VOCABULARY
from tests.small import CPU, small

package = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
TINY = Path(__file__).parents[2] / "resources" / "tiny"
ASYMMETRIC = Sweep(quantizers=["rtn"], bits=[2, 3, 4, 5, 6, 8, 16], group_sizes=[32], ranks=[0])
SYMMETRIC = ASYMMETRIC.model_copy(update={"symmetric": True})
MIXED = Sweep(quantizers=["rtn"], bits=[2, 4, 8], group_sizes=[16, 64], ranks=[0, 2])
FAMILY = pytest.mark.parametrize("family", list(gguf.ARCHITECTURES))
# no longer than the sliding window of the random models
IDS = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))


def checkpoint(
    folder: Path, family: str, sweep: Sweep, *, source: Path | None = None, chosen: Sequence[Option] = (), **how: Any
) -> bitalloc.Reader:
    bench = small(family, folder, sweep=sweep, source=source, **how)
    save(bench, folder / "plan", bench.plan(list(chosen) or options(sweep)))
    return bitalloc.Reader(folder / "plan")


def export(reader: bitalloc.Reader) -> Path:
    target = reader.folder.parent / "gguf" / "plan.gguf"
    gguf.save(target, reader)
    return target


def read_back(target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target.parent, gguf_file=target.name, dtype=torch.float32).eval()


def requantised(reader: bitalloc.Reader) -> Any:
    """The native checkpoint's model with the weights that the types of the file leave."""
    model = bitalloc.load_model(reader.folder, device=CPU)
    types = {entry.source.removesuffix(".weight"): entry.type for entry in gguf._entries(reader)}
    for layer in reader.plan:
        What_OI, kind = reader.matrix(layer).dequantize(), package.GGMLQuantizationType[types[layer]]
        if types[layer] in gguf.BITS:
            What_OI = torch.from_numpy(package.dequantize(gguf.encode(reader.matrix(layer), types[layer]), kind))
        elif types[layer] == "F16":
            What_OI = What_OI.half().float()
        set_weight(model, reader.family, layer, What_OI)
    return model


@FAMILY
@pytest.mark.parametrize("sweep", [ASYMMETRIC, SYMMETRIC, MIXED], ids=["zeros", "symmetric", "mixed"])
def test_transformers_reads_the_same_logits_and_the_size_is_as_promised(
    family: str, sweep: Sweep, tmp_path: Path
) -> None:
    reader = checkpoint(tmp_path, family, sweep)
    target = export(reader)
    assert target.stat().st_size == gguf.nbytes(reader)
    assert [path.name for path in target.parent.iterdir()] == ["plan.gguf"]
    with torch.inference_mode():
        found, expected = read_back(target)(IDS).logits, requantised(reader)(IDS).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("symmetric", "exact"), [(False, [2, 3]), (True, [2, 3, 4, 8])])
def test_codes_pass_exactly(symmetric: bool, exact: list[int], tmp_path: Path) -> None:
    sweep = Sweep(quantizers=["rtn"], bits=exact, group_sizes=[32, 64, 128], ranks=[0], symmetric=symmetric)
    reader = checkpoint(tmp_path, "qwen2", sweep, source=TINY)
    seen = set()
    for layer in reader.plan:
        matrix = reader.matrix(layer)
        kind = gguf.through(matrix.option, matrix.columns)
        found = package.dequantize(gguf.encode(matrix, kind), package.GGMLQuantizationType[kind])
        assert np.array_equal(found, matrix.dequantize().numpy())
        seen.add(matrix.option)
    assert seen == set(options(sweep))


def test_four_bits_with_zeros_pass_but_for_the_rounding_of_the_minimum(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, "qwen2", ASYMMETRIC, source=TINY, chosen=[Option("rtn", 4, 32, 0)])
    for layer in reader.plan:
        matrix = reader.matrix(layer)
        found = package.dequantize(gguf.encode(matrix, "Q4_1"), package.GGMLQuantizationType.Q4_1)
        step_OI = matrix.scale_OG.float().repeat_interleave(32, dim=1)
        # zero * scale has up to 15 bits, the minimum 11: half a unit in the last place of at most 15 steps
        assert bool(((torch.from_numpy(found) - matrix.dequantize()).abs() <= step_OI * 15 * 2**-11).all())


def test_the_type_is_the_nearest_above_what_is_paid() -> None:
    def kind(bits: int, group_size: int, rank: int, columns: int = 1024) -> str:
        return gguf.coded(Option("rtn", bits, group_size, rank), 1024, columns)

    assert [kind(2, 128, 0), kind(2, 16, 0), kind(3, 128, 32), kind(4, 128, 32)] == ["Q4_0", "Q4_0", "Q4_0", "Q4_1"]
    assert [kind(4, 16, 0), kind(4, 128, 128), kind(8, 128, 0), kind(8, 16, 64)] == ["Q5_0", "Q8_0", "Q8_0", "Q8_0"]
    assert [kind(2, 32, 0, 172), kind(8, 32, 0, 172)] == ["F16", "F16"]


def test_bfloat16_stays_and_positions_end_at_the_window(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, "mistral", ASYMMETRIC, dtype=torch.bfloat16)
    found = package.GGUFReader(export(reader))
    types = {tensor.name: tensor.tensor_type.name for tensor in found.tensors}
    assert (types["token_embd.weight"], types["output_norm.weight"]) == ("BF16", "F32")
    assert "BF16" in {kind for name, kind in types.items() if name.startswith("blk.")}
    assert found.fields["llama.context_length"].contents() == 8
    assert found.fields["general.architecture"].contents() == "llama"


def test_the_card_lies_beside_the_file_and_two_files_are_equal(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, "llama", ASYMMETRIC)
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    gguf.save(one, reader, card="# a plan\n")
    gguf.save(two, reader)
    assert (tmp_path / "one.md").read_text() == "# a plan\n"
    assert one.read_bytes() == two.read_bytes()


def edit(reader: bitalloc.Reader, **changes: Any) -> None:
    file = reader.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(gguf.ARCHITECTURES)))
def test_other_families_are_refused_and_the_format_that_can_is_named(family: str, tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, family, MIXED)
    with pytest.raises(BitallocError, match=rf"gguf: family '{family}' is not written .*native checkpoint") as caught:
        gguf.save(tmp_path / "x.gguf", reader)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "computes silu, this model 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "positions of type 'linear'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes: dict, reason: str, tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, "llama", MIXED)
    edit(reader, **changes)
    with pytest.raises(BitallocError, match=reason):
        gguf.nbytes(reader)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = checkpoint(tmp_path, "llama", MIXED)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BitallocError, match=r"not installed; pip install 'bitalloc\[gguf\]'"):
        gguf.nbytes(reader)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(BitallocError, match=r"K-quants need llama-cpp-python; install it"):
        gguf.save(tmp_path / "k" / "x.gguf", reader, k_quants=True)
    assert list((tmp_path / "k").iterdir()) == []


def test_tokenizers_that_gguf_has_no_word_for_are_refused(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path, "llama", MIXED)
    file, tokenizer = reader.folder / "tokenizer.json", json.loads((TINY / "tokenizer.json").read_text())
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(BitallocError, match="the tokenizer has 1024 tokens, the embedding 96 rows"):
        gguf.refuse(reader)
    edit(reader, vocab_size=1024)
    file.write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(BitallocError, match=r"pre-tokenizer .*Whitespace.* is not known"):
        gguf.refuse(reader)
    file.write_text(json.dumps(tokenizer | {"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(BitallocError, match="a Unigram tokenizer is not written"):
        gguf.refuse(reader)
    file.rename(reader.folder / "tokenizer.model")
    with pytest.raises(BitallocError, match=r"a tokenizer but no tokenizer\.json"):
        gguf.refuse(reader)


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = checkpoint(tmp_path, "llama", MIXED)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_data", full)
    with pytest.raises(BitallocError, match=r"cannot write .*plan.gguf: No space left on device; free space"):
        export(reader)
    assert list((tmp_path / "gguf").iterdir()) == []


def test_pre_tokenizers_are_known_by_what_they_do() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    def split(pattern: str) -> dict[str, Any]:
        steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
        cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [*steps, cut]}

    assert gguf._cut(split(PRETOKENIZE_REGEX)) == "qwen2"
    assert gguf._cut(split(PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|"))) == "llama-bpe"
    assert gguf._cut({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}) == "gpt-2"
    with pytest.raises(BitallocError, match="is not known"):
        gguf._cut({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True})


# ---- vocabulary and llama.cpp -------------------------------------------------------------------------
def stories() -> Path:
    if not (root := os.environ.get("BITALLOC_DATA")):
        pytest.skip("BITALLOC_DATA is not set: no trained Llama here")
    return Path(root) / "models" / "stories260K" / "hf"


MODELS = pytest.mark.parametrize("name", ["tiny", pytest.param("stories260k", marks=pytest.mark.data)])
TEXTS = {
    "tiny": "The key of 1042 is 7; def f(x): return x + 1  # ok\n\nÅse's house",
    "stories260k": "Once upon a time, there was a little girl named Lily. She's 3 years old!\nÅse",
}


def trained(name: str, folder: Path) -> bitalloc.Reader:
    """A trained model at 8 and 4 bits, whose text is its own."""
    source, family = (TINY, "qwen2") if name == "tiny" else (stories(), "llama")
    chosen = [Option("rtn", bits, 32, 0) for bits in (8, 4)] + [Option("rtn", 4, 32, 2), Option("none", 16, 0, 0)]
    sweep = Sweep(quantizers=["rtn"], bits=[4, 8, 16], group_sizes=[32], ranks=[0, 2])
    return checkpoint(folder, family, sweep, source=source, chosen=chosen, dtype=torch.float32)


@MODELS
def test_the_vocabulary_comes_back(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    reader = trained(name, tmp_path)
    target = export(reader)
    ours = AutoTokenizer.from_pretrained(reader.folder)
    found = AutoTokenizer.from_pretrained(target.parent, gguf_file=target.name)
    assert found.convert_ids_to_tokens(range(len(ours))) == ours.convert_ids_to_tokens(range(len(ours)))
    assert found.encode(TEXTS[name], add_special_tokens=False) == ours.encode(TEXTS[name], add_special_tokens=False)
    fields = package.GGUFReader(target).fields  # transformers has its own idea of where a text ends
    ids = [fields[f"tokenizer.ggml.{token}_token_id"].contents() for token in ("bos", "eos")]
    assert ids == [ours.bos_token_id, ours.eos_token_id]
    # no piece of either vocabulary spans two digits, so that the texts alone could not tell
    assert fields["tokenizer.ggml.pre"].contents() == ("smollm" if name == "tiny" else "default")


@MODELS
def test_llama_cpp_reads_the_text_as_the_same_tokens_with_the_same_perplexity(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from transformers import AutoTokenizer

    reader = trained(name, tmp_path)
    llama = llama_cpp.Llama(str(export(reader)), n_ctx=512, n_threads=1, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(reader.folder)
    assert llama.tokenize(TEXTS[name].encode()) == tokenizer.encode(TEXTS[name])
    text = own_text(name)
    ids = tokenizer.encode(text)[:384]
    assert llama.tokenize(text.encode())[:384] == ids and len(ids) == 384
    llama.eval(ids)
    with torch.inference_mode():
        expected = nll(requantised(reader)(torch.tensor([ids])).logits[0], ids)
    # llama.cpp rounds activations to 8 bits where weights are quantised
    assert nll(torch.from_numpy(np.array(llama.scores[: len(ids)])), ids) == pytest.approx(expected, abs=0.01)
    assert expected < 0.8 * math.log(len(tokenizer))  # a trained model on its own text


def own_text(name: str) -> str:
    if name == "tiny":
        return "\n".join(islice(world_documents(seed=0, split="report"), 200))[:4000]
    return read_records(stories().parents[2] / "tinystories" / "tinystories_1000.json")[0] * 3


def nll(logits_TV: torch.Tensor, ids: Sequence[int]) -> float:
    """Nats a token: 0.01 apart is 1 % of perplexity."""
    return float(torch.nn.functional.cross_entropy(logits_TV[:-1].float(), torch.tensor(ids[1:])))


def test_llama_cpp_quantises_to_the_k_types_and_computes_what_they_say(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = wide("llama", tmp_path / "wide", hidden=256)
    sweep = Sweep(quantizers=["rtn"], bits=[2, 3, 4, 8, 16], group_sizes=[128], ranks=[0, 8])
    reader = checkpoint(tmp_path, "llama", sweep, source=source)
    target = tmp_path / "k.gguf"
    gguf.save(target, reader, k_quants=True)
    assert target.stat().st_size == gguf.nbytes(reader, k_quants=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    found = {tensor.name: tensor for tensor in package.GGUFReader(target).tensors}
    expected = {entry.name: entry for entry in gguf._entries(reader, True)}
    assert {name: tensor.tensor_type.name for name, tensor in found.items()} == {
        name: entry.type for name, entry in expected.items()
    }
    assert {"Q2_K", "Q3_K", "Q4_K", "Q8_0", "F16"} <= {entry.type for entry in expected.values()}
    for name, entry in expected.items():
        if entry.type.endswith("_K") and "attn_v" in name:  # its rows keep their places
            What_OI = reader.matrix(entry.source.removesuffix(".weight")).dequantize()
            left_OI = torch.from_numpy(package.dequantize(found[name].data, found[name].tensor_type)) - What_OI
            assert float(left_OI.norm() / What_OI.norm()) < {"2": 0.4, "3": 0.2}.get(entry.type[1], 0.1)
    model = read_back(target)
    ids = torch.randint(3, 1024, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    llama = llama_cpp.Llama(str(target), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    llama.eval(ids)
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids])).logits[0]
    assert nll(torch.from_numpy(np.array(llama.scores[:48])), ids) == pytest.approx(nll(logits_TV, ids), rel=0.01)
