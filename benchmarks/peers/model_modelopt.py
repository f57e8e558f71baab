"""ModelOpt's auto_quantize over blockwise weight-only integers of 2, 3, 4 and 8 bits, its own AWQ at 4 and below.

Its presets stop at 4 bits, so formats are made as its documentation makes custom ones, with `effective_bits` that
count the scales. It simulates: nothing packs 2 or 3 bits, so bytes are those of the codes and of 16-bit scales; the
scales of inputs that AWQ leaves behind are not counted, since its export folds them into the layers before.
"""

from __future__ import annotations

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole import Job, Stored, work


def recipe(bits: int, group_size: int) -> dict:
    weights = {"num_bits": bits, "block_sizes": {-1: group_size, "type": "static"}}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weights},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": "max" if bits == 8 else "awq_lite",
        "effective_bits": bits + 16 / group_size,
    }


def quantise(job: Job) -> tuple[str, Stored | None]:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    batches = [{"input_ids": ids_T[None], "labels": ids_T[None]} for ids_T in job.ids()]
    formats = [recipe(bits, group) for bits in (2, 3, 4, 8) for group in (128, 64, 32)]
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": job.bpw, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
        quantization_formats=formats,
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, _: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=len(batches),
        num_score_steps=min(128, len(batches)),
    )
    found = {name: effective(model.get_submodule(name)) for name in job.layers}
    job.keep({name: What_OI for name, (What_OI, _) in found.items()})
    return "auto_quantize, 12 formats, awq_lite", {name: parts for name, (_, parts) in found.items()}


def effective(module: torch.nn.Module) -> tuple[Tensor, dict[str, list]]:
    """What_OI with the scale of its input multiplied in, and what it takes to store it."""
    W_OI, quantizer = module.weight.detach(), module.weight_quantizer
    rows, columns = W_OI.shape
    if not quantizer.is_enabled:
        return W_OI, {"weight": ["F16", [rows, columns]]}
    bits, group_size = quantizer.num_bits, quantizer.block_sizes[-1]
    groups = -(-columns // group_size)
    parts = {"codes": ["U8", [rows * columns * bits // 8]], "scales": ["F16", [rows, groups]]}
    with torch.no_grad():
        What_OI = quantizer(W_OI)
    scale_I = getattr(module.input_quantizer, "pre_quant_scale", None)
    if scale_I is not None:
        What_OI = What_OI * scale_I
    return What_OI, parts


if __name__ == "__main__":
    work("nvidia-modelopt", quantise)
