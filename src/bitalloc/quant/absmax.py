"""INT8 as it is done without calibration: symmetric, one scale a row, set by the row's largest weight.

The absmax quantisation of Dettmers et al. (LLM.int8(), 2022, section 2), weights alone. It is no member of the family:
nothing is searched and no moment is read, so that plans can be run before anything is calibrated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitalloc.option import Option
from bitalloc.quant import CompressedMatrix
from bitalloc.quant.grid import LARGEST, SMALLEST


def absmax(W_OI: Tensor, option: Option) -> CompressedMatrix:
    """Codes round(w / s) with s = max|w| / (2^(bits-1) - 1) in each group of a row, s a 16-bit float; on the CPU.

    >>> option = Option("absmax", 8, 4, 0)
    >>> stored = absmax(torch.tensor([[127.0, -63.6, 1.4, 0.0]]), option)
    >>> stored.dequantize().tolist(), stored.nbytes == option.nbytes(1, 4)
    ([[127.0, -64.0, 1.0, 0.0]], True)
    """
    (rows, columns), middle = W_OI.shape, 2 ** (option.bits - 1)
    padded = torch.nn.functional.pad(W_OI.cpu().float(), (0, -columns % option.group_size))
    grouped_OGg = padded.view(rows, -1, option.group_size)
    scale_OG = (grouped_OGg.abs().amax(dim=2) / (middle - 1)).clamp(SMALLEST, LARGEST).half()
    codes_OGg = (grouped_OGg / scale_OG.float()[..., None]).round_().clamp_(1 - middle, middle - 1) + middle
    codes_OI = codes_OGg.to(torch.uint8).view(rows, -1)[:, :columns].contiguous()
    return CompressedMatrix(option, rows, columns, codes_OI=codes_OI, scale_OG=scale_OG)
