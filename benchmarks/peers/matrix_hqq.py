"""hqq's `Quantizer.quantize` on one matrix, with its default optimiser. It sees no inputs.

Options as in hqq's `BaseQuantizeConfig`: groups along the input, zeros rounded at 4 bits before the optimiser moves
them. Measured: ranges, optimiser, codes, packing of the codes. Scales and zeros stay in float32.
"""

from __future__ import annotations

from typing import Any

from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from measured import Tool, work
from torch import Tensor


def prepare(W_OI: Tensor, _: None, settings: dict[str, Any]) -> dict[str, Any]:
    config = BaseQuantizeConfig(nbits=settings["bits"], group_size=settings["group_size"])
    return {"tensor": W_OI, "device": "cpu"} | config["weight_quant_params"]


if __name__ == "__main__":
    quantise = lambda prepared: Quantizer.quantize(**prepared)  # noqa: E731
    work(Tool("hqq", "", prepare, quantise, lambda found: Quantizer.dequantize(*found)))
