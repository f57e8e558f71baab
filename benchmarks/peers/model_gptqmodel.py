"""GPTQModel's GPTQ at one setting for all matrices, the largest that fits; its defaults otherwise.

It has no search of its own: `dynamic` only takes what one already knows. Here it gives matrices whose width is no
multiple of the group one group a row. Symmetric codes, its default, store zero points all the same.
"""

from __future__ import annotations

from gptqmodel import GPTQModel
from gptqmodel.quantization import QuantizeConfig
from torch import Tensor
from whole import Job, Stored, largest, work


def quantise(job: Job) -> tuple[str, Stored | None]:
    bits, group_size = largest(job, zeros=True)
    odd = {columns for _, columns in job.layers.values() if columns % group_size}
    rows = {
        rf"+:.*{name.replace('.', chr(92) + '.')}$": {"group_size": -1}
        for name, sides in job.layers.items()
        if sides[1] in odd
    }
    # its default order of columns, by group, takes no group as long as a row
    order = {"act_group_aware": False} if rows else {}
    config = QuantizeConfig(bits=bits, group_size=group_size, dynamic=rows or None, offload_to_disk=False, **order)
    model = GPTQModel.load(job.model, config, device="cpu")
    ids_NT = job.ids()
    calibration = [{"input_ids": ids_T.tolist(), "attention_mask": [1] * len(ids_T)} for ids_T in ids_NT]
    model.quantize(calibration, batch_size=1)
    model.save(str(job.checkpoint))
    with job.aside():
        weights = unpacked(job)
    job.keep(weights)
    return f"{bits} bits, group {group_size}", None


def unpacked(job: Job) -> dict[str, Tensor]:
    """What_OI from the packed codes, by the library's own modules."""
    model = GPTQModel.load(str(job.checkpoint), device="cpu", backend="torch")
    modules = dict(model.model.named_modules())
    return {name: modules[name].dequantize_weight().T for name in job.layers}


if __name__ == "__main__":
    work("gptqmodel", quantise)
