"""GPTQModel's GPTQ on one matrix: `GPTQ.add_batch`, then `GPTQ.quantize`, as its own loop over layers calls them.

No model is loaded. Measured: scaling of the moments, order, damping, Cholesky factor and inverse, scales, column
loop, loss. Not measured: `add_batch`. It packs elsewhere. Scales stay in float32, where a checkpoint has 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from measured import Tool, work
from torch import Tensor


def prepare(W_OI: Tensor, X_TI: Tensor, settings: dict[str, Any]) -> GPTQ:
    layer = torch.nn.Linear(*reversed(W_OI.shape), bias=False, device="meta")
    layer.weight = torch.nn.Parameter(W_OI, requires_grad=False)
    config = QuantizeConfig(
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        damp_percent=settings["damping"],
        act_group_aware=settings["order"] == "groups",
        desc_act=settings["order"] == "columns",
        mse=settings["mse"],
        offload_to_disk=False,
    )
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(X_TI, None)
    return task


def quantise(task: GPTQ) -> Tensor:
    What_OI, _, _, _, _, loss, damping, _ = task.quantize()
    # where it cannot factorise it damps more, or rounds to nearest: that would be another method
    if not isinstance(loss, float) or damping != task.qcfg.damp_percent:
        raise SystemExit(f"GPTQModel did not keep to its settings: loss {loss}, damping {damping}")
    return What_OI


if __name__ == "__main__":
    work(Tool("gptqmodel", "X_TI", prepare, quantise, lambda What_OI: What_OI))
