"""hqq at one setting for all matrices, the largest that fits; its defaults otherwise. It sees no text.

Scales and zero points are 16-bit numbers; it packs 3-bit codes ten to 32 bits.
"""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM
from whole import Job, Stored, work

NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int32: "I32"}


def size(job: Job, bits: int, group_size: int) -> int:
    """Bytes of all layers: codes as they are packed, two 16-bit numbers a group."""
    packed = 3.2 if bits == 3 else bits
    return int(sum(rows * columns * (packed + 32 / group_size) / 8 for rows, columns in job.layers.values()))


def quantise(job: Job) -> tuple[str, Stored | None]:
    sizes = {(bits, group): size(job, bits, group) for bits in (2, 3, 4, 8) for group in (128, 64, 32)}
    fits = {place: each for place, each in sizes.items() if each <= job.nbytes}
    bits, group_size = max(fits, key=fits.__getitem__) if fits else min(sizes, key=sizes.__getitem__)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float16)
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    modules = {name: model.get_submodule(name) for name in job.layers}
    job.keep({name: m.dequantize() if isinstance(m, HQQLinear) else m.weight for name, m in modules.items()})
    return f"{bits} bits, group {group_size}", {name: tensors(module) for name, module in modules.items()}


def tensors(module: torch.nn.Module) -> dict[str, list]:
    """What a layer of hqq's own checkpoint holds."""
    if not isinstance(module, HQQLinear):
        return {"weight": ["F16", list(module.weight.shape)]}
    parts = {"W_q": module.W_q, "scale": module.meta["scale"], "zero": module.meta["zero"]}
    return {name: [NAMES[part.dtype], list(part.shape)] for name, part in parts.items()}


if __name__ == "__main__":
    work("hqq", quantise)
