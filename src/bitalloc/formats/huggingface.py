"""Hugging Face format: `compressed-tensors` (pack-quantized) and, where there is rank, a PEFT adapter.

    model-00001-of-N.safetensors   a file for each block, one for the rest; exactly the codes and scales of the plan
    adapter/                       L and R as lora_B and lora_A of a LoRA with a rank for each matrix, scale 1

Plain `transformers` with `compressed-tensors` and `peft` loads both and knows nothing of this package. A matrix
W_OI with G groups of g inputs, b-bit codes and rank r is stored as

    <layer>.weight_packed  I32  [O, ceil(I b / 32)]   the native bitstream, rows padded to words
    <layer>.weight_scale   F16  [O, G]
    <layer>.weight_shape   I64  [2]
    lora_A, lora_B         F16  [r, I], [O, r]        16-bit factors
                           F16  [r, I], F32 [O, r]    8-bit factors: integers, integers times both scales

and nothing is rounded further than float32. 8-bit factors take three times their bytes here: sweep with
`factor_bits: 16` for this format.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitalloc.errors import BitallocError
from bitalloc.formats.bitalloc import MANIFEST, Reader
from bitalloc.formats.carried import LORA, SERVED, compressed_tensors, index, lora_tensors
from bitalloc.formats.files import copy_small, replacing, write
from bitalloc.formats.layout import Layout, Stored, block_file, in_order, matrix_tensors
from bitalloc.formats.layout import nbytes as nbytes_of
from bitalloc.option import PASS_THROUGH, from_row
from bitalloc.quant.packing import pack, unpack
from bitalloc.store import write_atomically

FAMILIES = ("llama", "qwen2", "mistral")
METADATA = {"format": "pt"}
ADAPTER = "adapter/adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


def refuse(reader: Reader) -> None:
    """Raise `BitallocError` for what `compressed-tensors` loads wrong or not at all."""
    if reader.family.name not in FAMILIES:
        raise BitallocError(
            f"huggingface carries {', '.join(FAMILIES)}, not {reader.family.name}: use the native format (bitalloc)"
        )
    for layer, row in reader.plan.items():
        if row["quantizer"] == PASS_THROUGH:
            continue
        why = None
        if row["block"] < 0:
            raise BitallocError(
                f"huggingface leaves embedding and head at 16 bits, {layer} has {row['bits']}; set "
                "sweep.embedding_bits to [16], or export gguf"
            )
        if row["bits"] not in SERVED:
            why = f"has {row['bits']} bits, which is none of {SERVED}"
        elif row["columns"] % row["group_size"]:
            why = f"has {row['columns']} inputs, no multiple of the group size {row['group_size']}"
        if why:
            raise BitallocError(f"huggingface cannot carry {layer}: it {why}, or use the native format (bitalloc)")


def layout(reader: Reader) -> Layout:
    """File -> its tensors, in the order in which safetensors stores them."""
    files: Layout = {}
    adapter: list[Stored] = []
    native = list(reader.manifest["files"])
    coded = {layer: row for layer, row in reader.plan.items() if row["quantizer"] != PASS_THROUGH}
    packed = {
        stored.name
        for layer, row in coded.items()
        for stored in matrix_tensors(layer, row["rows"], row["columns"], from_row(row, reader.options))
    }
    for place, file in enumerate(native, 1):
        kept = [stored for stored in reader.stored(file) if stored.name not in packed]
        mine = {layer: row for layer, row in coded.items() if block_file(row["block"]) == file}
        made = [
            stored
            for layer, row in mine.items()
            for stored in compressed_tensors(layer, row["rows"], row["columns"], from_row(row, reader.options))
        ]
        files[f"model-{place:05d}-of-{len(native):05d}.safetensors"] = in_order(kept + made)
        for layer, row in mine.items():
            adapter += lora_tensors(layer, row["rows"], row["columns"], from_row(row, reader.options))
    return files | ({ADAPTER: in_order(adapter)} if adapter else {})


def nbytes(reader: Reader) -> int:
    """Bytes on disk of all safetensors files and of the index of the model's."""
    files = layout(reader)
    return nbytes_of(files, METADATA) + len(index(_weights(files)))


def measure(target: Path) -> int:
    """Bytes on disk of what `nbytes` counts."""
    return sum(file.stat().st_size for file in (*target.rglob("*.safetensors"), target / INDEX))


def save(target: Path, reader: Reader, *, card: str = "") -> None:
    """Write a checkpoint for strangers; raises `BitallocError` as `refuse` and `replacing` do."""
    refuse(reader)
    files = layout(reader)
    native = {stored.name: file for file in reader.manifest["files"] for stored in reader.stored(file)}
    with replacing(target) as folder:
        copy_small(reader.folder, folder, without=[MANIFEST])
        for file, tensors in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write(folder / file, tensors, partial(_tensor, reader, native), METADATA)
        write_atomically(folder / INDEX, index(_weights(files)))
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw["quantization_config"] = quantization_config(reader)
        write_atomically(folder / "config.json", _json(raw))
        if ADAPTER in files:
            write_atomically((folder / ADAPTER).with_name("adapter_config.json"), _json(adapter_config(reader)))
        if card:
            write_atomically(folder / "README.md", card.encode())


def quantization_config(reader: Reader) -> dict[str, Any]:
    """What `config.json` says to `compressed-tensors`: a group for each (bits, group size), by exact names."""
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    kept = ["lm_head"]
    for layer, row in reader.plan.items():
        if row["quantizer"] == PASS_THROUGH:
            kept.append(layer)
        else:
            groups[row["bits"], row["group_size"]].append(layer)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{k}": {
                "targets": groups[bits, size],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "strategy": "group",
                    "group_size": size,
                    "symmetric": reader.options.symmetric,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for k, (bits, size) in enumerate(sorted(groups))
        },
    }


def adapter_config(reader: Reader) -> dict[str, Any]:
    """What `peft` needs; with alpha equal to the rank of each matrix the scale is 1."""
    ranks = {layer: row["rank"] for layer, row in reader.plan.items() if row["rank"]}
    usual = max(ranks.values())
    # peft takes a pattern for the end of a name: whole names, so that no other module ends alike
    patterns = {layer: rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _tensor(reader: Reader, native: Mapping[str, str], name: str) -> Tensor:
    """A tensor under its name here; `native` has the file of those that are kept."""
    if name in native:
        return reader.raw(native[name], name)
    if name.startswith(LORA):
        layer, _, part = name.removeprefix(LORA).removesuffix(".weight").rpartition(".")
    else:
        layer, _, part = name.rpartition(".")
    row = reader.plan[layer]
    rows, bits = row["rows"], row["bits"]
    if part == "weight_shape":
        return torch.tensor([rows, row["columns"]])

    def raw(which: str) -> Tensor:  # a part of the matrix: unpacking all of it would take most of the time
        return reader.raw(block_file(row["block"]), f"{layer}.{which}")

    scaled = row["rank"] and reader.options.factor_bits == 8
    if part == "lora_A":
        return raw("R").half()
    if part == "lora_B":
        return scaled_factor(raw("L"), raw("L_scale"), raw("R_scale")) if scaled else raw("L")
    if part == "weight_scale":
        return raw("scale")
    if part == "weight_zero_point":  # packed along the rows, as servers slice them
        zero_OG = unpack(raw("zero")[None], bits, rows * (row["columns"] // row["group_size"])).view(rows, -1)
        return _words(pack(zero_OG.T.contiguous(), bits)).T
    return _words(raw("weight").view(rows, -1))


def _words(packed: Tensor) -> Tensor:
    """Rows of bytes [rows, n] as rows of words [rows, ceil(n / 4)]."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def scaled_factor(L_OR: Tensor, L_scale_R: Tensor, R_scale_R: Tensor) -> Tensor:
    """B_OR, float32, of 8-bit factors: A holds the integers of R, so that B takes both scales, in one rounding.

    >>> scaled_factor(torch.tensor([[3]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([0.25])).item()
    0.375
    """
    return L_OR.float() * (L_scale_R.float() * R_scale_R.float())


def _weights(files: Layout) -> Layout:
    return {file: tensors for file, tensors in files.items() if file != ADAPTER}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def licence(card: Path) -> str | None:
    """The `license` in the front matter of a model card; None without one."""
    try:
        _, front, _ = card.read_text(encoding="utf-8").split("---", 2)
    except (OSError, ValueError):
        return None
    found = [line.partition(":")[2].strip() for line in front.splitlines() if line.startswith("license:")]
    return found[0] if found else None
