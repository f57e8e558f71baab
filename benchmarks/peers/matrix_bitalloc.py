"""bitalloc's own decomposition of one matrix at rank 0, measured as its peers are.

Measured: order, damping, Cholesky factor of the moments, scales, column loop, error. Packing is done elsewhere.
"""

from __future__ import annotations

from typing import Any

from measured import Tool, work
from torch import Tensor

from bitalloc.lowrank import Decomposition, Factor, decompose
from bitalloc.option import Option


def ours(W_OI: Tensor, H_II: Tensor, option: Option, damping: float) -> Decomposition:
    return decompose(W_OI, Factor(H_II, damping), [option], act_order=True, iterations=1)[0]


def prepare(W_OI: Tensor, H_II: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    option = Option("gptq", settings["bits"], settings["group_size"], 0, symmetric=settings["symmetric"])
    return {"W_OI": W_OI, "H_II": H_II, "option": option, "damping": settings["damping"]}


if __name__ == "__main__":
    work(Tool("bitalloc", "H_II", prepare, lambda given: ours(**given), lambda found: found.matrix.dequantize()))
