"""A GPTQ checkpoint, for GPTQModel: the codes as they are, bits and group size of each matrix in `dynamic`.

What is stored for a matrix, codes and zeros as little-endian streams of bits along inputs and outputs:

    <layer>.qweight  I32  [I b / 32, O]      each column the packed codes of a row of W_OI
    <layer>.qzeros   I32  [G, O b / 32]      zeros; minus one in version 1
    <layer>.scales   F16  [G, O]
    <layer>.g_idx    I32  [I]                group of each input

Version 1 (`gptq`) stores zeros minus one, so that a zero of 0 has no code: it is written for symmetric codes, which
all readers take, and version 2 (`gptq_v2`) for others.

Legend: O outputs, I inputs, G groups, b bits.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bitalloc.errors import BitallocError
from bitalloc.formats.bitalloc import MANIFEST, Reader
from bitalloc.formats.carried import SERVED, gptq_tensors
from bitalloc.formats.files import copy_small, replacing, write
from bitalloc.formats.layout import Stored, header
from bitalloc.models import read_config
from bitalloc.option import PASS_THROUGH, Option, from_row
from bitalloc.quant.packing import pack
from bitalloc.store import write_atomically

FAMILIES = ("llama", "mistral", "opt", "phi", "qwen2")  # GPT-2 stores its matrices transposed
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # those that GPTQModel has kernels for
WEIGHTS = "model.safetensors"
METADATA = {"format": "pt"}
_INSTEAD = "the native checkpoint carries it"


def refuse(reader: Reader) -> None:
    """Raise `BitallocError` for what GPTQModel would not load or get wrong."""
    if reader.family.name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BitallocError(f"gptq: family {reader.family.name!r} is not written ({known} are); {_INSTEAD}")
    if not (coded := _coded(reader)):
        raise BitallocError("gptq: no matrix of this plan has codes; use the source as it is")
    for layer, option in coded.items():
        row = reader.plan[layer]
        if row["block"] < 0:
            raise BitallocError(
                f"gptq: embedding and head stay at 16 bits, {layer} has {row['bits']}; set sweep.embedding_bits to "
                "[16], or export gguf"
            )
        if option.bits not in SERVED:
            raise BitallocError(f"gptq: {layer} has {option.bits} bits, which is none of {SERVED}; {_INSTEAD}")
        word = 32 // (1 if option.bits == 3 else option.bits)  # codes that fill 32-bit words
        if option.rank:
            raise BitallocError(
                f"gptq: {layer} has rank {option.rank}, which has no place here; export huggingface (with an adapter)"
            )
        if row["columns"] % word or row["rows"] % word:
            raise BitallocError(
                f"gptq: {layer} is {row['rows']} x {row['columns']}, which {option.bits}-bit codes do not pack into "
                f"words (multiples of {word}); {_INSTEAD}"
            )
        if (size := _group_size(option, row["columns"])) != -1 and size not in GROUP_SIZES:
            raise BitallocError(f"gptq: {layer} has groups of {size}, not one of {GROUP_SIZES}; {_INSTEAD}")
        if size != -1 and row["columns"] % size:
            raise BitallocError(f"gptq: {layer} has {row['columns']} inputs, not full groups of {size}; {_INSTEAD}")


def nbytes(reader: Reader) -> int:
    """Exact bytes of the weights file that `save` will write."""
    refuse(reader)
    tensors = _tensors(reader)
    return len(header(tensors, METADATA)) + sum(tensor.nbytes for tensor in tensors)


def measure(target: Path) -> int:
    """Bytes on disk of what `nbytes` counts: the weights."""
    return (target / WEIGHTS).stat().st_size


def save(target: Path, reader: Reader, *, card: str = "") -> None:
    """Write the folder `target`, one matrix in memory."""
    refuse(reader)

    @lru_cache(maxsize=1)
    def parts(layer: str) -> dict[str, torch.Tensor]:
        return _parts(reader, layer)

    def get(name: str) -> torch.Tensor:
        layer, _, part = name.rpartition(".")
        return reader.tensor(name) if layer not in reader.plan or part == "bias" else parts(layer)[part]

    settings = _settings(reader)
    with replacing(Path(target)) as temporary:
        write(temporary / WEIGHTS, _tensors(reader), get, METADATA)
        copy_small(reader.folder, temporary, without=[MANIFEST])
        config = {**read_config(reader.folder), "quantization_config": settings}
        for name, content in {"config.json": config, "quantize_config.json": settings}.items():
            write_atomically(temporary / name, json.dumps(content, indent=2, sort_keys=True).encode())
        if card:
            write_atomically(temporary / "README.md", card.encode())


def _coded(reader: Reader) -> dict[str, Option]:
    """Layer -> option of those that are not passed through."""
    options = {layer: from_row(row, reader.options) for layer, row in reader.plan.items()}
    return {layer: option for layer, option in options.items() if option.quantizer != PASS_THROUGH}


def _group_size(option: Option, columns: int) -> int:
    """-1 where one group spans the row."""
    return -1 if option.group_size >= columns else option.group_size


def _tensors(reader: Reader) -> list[Stored]:
    coded, tensors = _coded(reader), []
    for name, (dtype, shape) in reader.untouched().items():
        tensors.append(Stored(name, dtype, shape))
    for layer, row in reader.plan.items():
        rows, columns = row["rows"], row["columns"]
        if layer not in coded:
            dtype = "BF16" if reader.matrix(layer).weight_OI.dtype == torch.bfloat16 else "F16"
            tensors.append(Stored(f"{layer}.weight", dtype, (rows, columns)))
            continue
        tensors += gptq_tensors(layer, rows, columns, coded[layer])
    return tensors


def _parts(reader: Reader, layer: str) -> dict[str, torch.Tensor]:
    matrix = reader.matrix(layer)
    if matrix.weight_OI is not None:
        return {"weight": matrix.weight_OI}
    bits, first = matrix.option.bits, int(matrix.option.symmetric)
    zero_OG = matrix.zero_OG
    if zero_OG is None:
        zero_OG = torch.full_like(matrix.scale_OG, 2 ** (bits - 1), dtype=torch.uint8)
    return {
        "qweight": pack(matrix.codes_OI, bits).view(torch.int32).T.contiguous(),
        "qzeros": pack(zero_OG.T - first, bits).view(torch.int32),
        "scales": matrix.scale_OG.T.contiguous(),
        "g_idx": torch.arange(matrix.columns, dtype=torch.int32) // matrix.option.group_size,
    }


def _settings(reader: Reader) -> dict[str, Any]:
    """`quantization_config`: what most matrices have, and in `dynamic` what departs from it."""
    schemes = {
        layer: {"bits": option.bits, "group_size": _group_size(option, reader.plan[layer]["columns"])}
        for layer, option in _coded(reader).items()
    }
    common = dict(Counter(tuple(scheme.items()) for scheme in schemes.values()).most_common(1)[0][0])
    dynamic: dict[str, dict[str, int]] = {}
    for layer in reader.plan:
        if layer not in schemes:
            dynamic[f"-:^{re.escape(layer)}$"] = {}
        elif schemes[layer] != common:
            dynamic[f"+:^{re.escape(layer)}$"] = schemes[layer]
    return {
        **common,
        "checkpoint_format": "gptq" if reader.options.symmetric else "gptq_v2",
        "desc_act": False,
        "dynamic": dynamic,
        "lm_head": False,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": reader.options.symmetric,
    }
