"""Import this, and `transformers` loads, runs and saves native checkpoints: the claimed matrices stay packed.

    import bitalloc.formats.packed
    model = AutoModelForCausalLM.from_pretrained("results/tiny/models/best-2.3bpw")

A matrix holds its stored tensors as buffers under their stored names. Each forward unpacks a few rows at a time,
multiplies and forgets them; L R is never formed. Frozen: there is nothing here to train.

Shapes: O outputs, I inputs, N rows of x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitalloc.errors import BitallocError
from bitalloc.formats.bitalloc import FORMAT, MANIFEST, Reader, tensors_of
from bitalloc.formats.layout import Stored, matrix_tensors
from bitalloc.option import Option
from bitalloc.quant import CompressedMatrix
from bitalloc.quant.packing import unpack

AT_ONCE = 2**18  # codes; unpacking one takes about 20 bytes for the moment
_TORCH = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16}


class Packed(nn.Module):
    """y = x Q^T + (x R^T) L^T + bias, from the stored tensors of one matrix, whose types no cast changes."""

    def __init__(self, option: Option, rows: int, columns: int, stored: Sequence[Stored], bias: Tensor | None) -> None:
        super().__init__()
        self.option, self.rows, self.columns = option, rows, columns
        for tensor in stored:
            empty = torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype], device="meta")
            self.register_buffer(tensor.name.rpartition(".")[2], empty)
        self.register_parameter("bias", bias)

    def forward(self, x_NI: Tensor) -> Tensor:
        y_NO = self.multiply(x_NI)
        return y_NO if self.bias is None else y_NO + self.bias

    def multiply(self, x_NI: Tensor) -> Tensor:
        """x What^T."""
        y_NO = torch.cat([linear(x_NI, Q_OI.to(x_NI.dtype)) for Q_OI in self._quantised()], dim=-1)
        if self.option.rank:
            L_OR, R_RI = (factor.to(x_NI.dtype) for factor in self._lowrank().factors())
            y_NO = y_NO + linear(linear(x_NI, R_RI), L_OR)
        return y_NO

    def dequantize(self) -> Tensor:
        """What_OI = Q + L R, float32."""
        Q_OI = torch.cat(list(self._quantised()))
        return Q_OI + self._lowrank().lowrank_part() if self.option.rank else Q_OI

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.option.name}, bias={self.bias is not None}"

    def _quantised(self) -> Iterator[Tensor]:
        """Rows of Q_OI, float32, a block at a time: by eights, so that the zeros of a block begin at a byte."""
        parts, option = self._buffers, replace(self.option, rank=0)
        step = max(AT_ONCE // self.columns // 8, 1) * 8
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            block = {"weight": parts["weight"].view(self.rows, -1)[start:stop]}
            if "scale" in parts:
                block["scale"] = parts["scale"][start:stop]
            if "zero" in parts:
                bits = option.bits * block["scale"].shape[1]
                block["zero"] = parts["zero"][start * bits // 8 : -(-stop * bits // 8)]
            yield CompressedMatrix.from_tensors(option, stop - start, self.columns, block).dequantize()

    def _lowrank(self) -> CompressedMatrix:
        names = {"L": "L_OR", "R": "R_RI", "L_scale": "L_scale_R", "R_scale": "R_scale_R"}
        parts = {names[name]: tensor for name, tensor in self._buffers.items() if name in names}
        return CompressedMatrix(self.option, self.rows, self.columns, **parts)

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        """Go where the model goes (`model.to`), but keep the types: scales are exact in float16 only."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in self._buffers.items():
            if tensor.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(tensor.device)
        return self


class PackedEmbedding(Packed):
    """The rows of What_OI that the ids name, in the type that the model computes in."""

    def __init__(self, option: Option, rows: int, columns: int, stored: Sequence[Stored], dtype: torch.dtype) -> None:
        super().__init__(option, rows, columns, stored, None)
        self.dtype = dtype

    def forward(self, ids_N: Tensor) -> Tensor:
        rows, option, parts = ids_N.flatten(), self.option, self._buffers
        weight = parts["weight"].view(self.rows, -1)[rows]
        if "scale" in parts:
            scale_OG = parts["scale"][rows]
            zero_OG = _picked(parts["zero"], option.bits, rows, scale_OG.shape[1]) if "zero" in parts else None
            codes_OI = unpack(weight, option.bits, self.columns)
            weight = CompressedMatrix(option, len(rows), self.columns, codes_OI, scale_OG, zero_OG).dequantize()
        return weight.to(self.dtype).view(*ids_N.shape, self.columns)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class TiedHead(nn.Module):
    """A head that multiplies by the embedding and holds nothing of its own but a bias."""

    def __init__(self, embedding: PackedEmbedding, bias: Tensor | None) -> None:
        super().__init__()
        self.embedding = (embedding,)  # in a tuple it is no child: its tensors are saved once
        self.register_parameter("bias", bias)

    def dequantize(self) -> Tensor:
        """What_VD, float32."""
        return self.embedding[0].dequantize()

    def forward(self, x_NI: Tensor) -> Tensor:
        y_NO = self.embedding[0].multiply(x_NI)
        return y_NO if self.bias is None else y_NO + self.bias


def _picked(stream: Tensor, bits: int, rows_N: Tensor, G: int) -> Tensor:
    """uint8 [N, G]: the zeros of some rows of a stream of codes; one lies in two neighbouring bytes at most."""
    start_NG = (rows_N[:, None] * G + torch.arange(G, device=rows_N.device)) * bits
    low, high = start_NG // 8, (start_NG // 8 + 1).clamp(max=len(stream) - 1)
    pair = stream[low].int() | (stream[high].int() << 8)
    return ((pair >> (start_NG % 8)) & (2**bits - 1)).to(torch.uint8)


@register_quantization_config(FORMAT)
@dataclass(kw_only=True)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the option of every claimed matrix by its name."""

    layers: dict[str, str]
    factor_bits: int
    symmetric: bool
    quant_method: str = FORMAT


@register_quantizer(FORMAT)
class PackedQuantizer(HfQuantizer):
    """Puts `Packed` in the place of every claimed matrix; refuses files that do not hold exactly what it needs."""

    requires_calibration = True  # cannot quantise a model while it is loaded
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Raises `BitallocError`: what is missing or of another shape would be made up or taken by `transformers`."""
        config, files = self.quantization_config, [Path(file) for file in checkpoint_files or ()]
        found, modules = _headers(files), dict(model.named_modules())
        if unknown := [layer for layer in config.layers if layer not in modules]:
            raise BitallocError(f"{type(model).__name__} has no {unknown[0]}; load it by AutoModelForCausalLM")
        promised: dict[str, Stored] = {}
        for layer, name in config.layers.items():
            option = Option.parse(name, factor_bits=config.factor_bits, symmetric=config.symmetric)
            module = modules[layer]
            rows, columns = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
            half = found[f"{layer}.weight"].dtype if f"{layer}.weight" in found else "F16"
            stored = matrix_tensors(layer, rows, columns, option, "BF16" if half == "BF16" else "F16")
            promised |= {tensor.name: tensor for tensor in stored}
            if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
                raise BitallocError(f"{layer} is a {type(module).__name__}, which cannot be packed; keep it at 16 bits")
            if isinstance(module, nn.Embedding):
                table = PackedEmbedding(option, rows, columns, stored, module.weight.dtype)
                model.set_submodule(layer, table)
                _tie(model, f"{layer}.weight", table)
            else:
                model.set_submodule(layer, Packed(option, rows, columns, stored, module.bias))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        wrong = {name for name, tensor in promised.items() if found.get(name) != tensor}
        wrong |= {
            n for n in shapes.keys() - model.all_tied_weights_keys if n not in found or found[n].shape != shapes[n]
        }
        wrong |= {name for name in found.keys() - shapes if name.rpartition(".")[0] in config.layers}
        if wrong:
            raise BitallocError(
                f"{min(wrong)} in {model.config.name_or_path} is missing or not what config.json says "
                f"({len(wrong)} tensors); fetch or compress the checkpoint again"
            )


def _tie(model: nn.Module, weight: str, embedding: PackedEmbedding) -> None:
    """Heads that are tied to the embedding read it packed; for `transformers` nothing is tied any more."""
    heads = {target for target, source in model.all_tied_weights_keys.items() if source == weight}
    for head in (target.removesuffix(".weight") for target in heads):
        model.set_submodule(head, TiedHead(embedding, model.get_submodule(head).bias))
    rest = {target: source for target, source in model.all_tied_weights_keys.items() if target not in heads}
    model.all_tied_weights_keys = model._tied_weights_keys = rest


def _headers(files: Sequence[Path]) -> dict[str, Stored]:
    """What weights files hold, by name; those that the manifest of a native checkpoint lists are verified."""
    native = Reader(files[0].parent) if files and (files[0].parent / MANIFEST).is_file() else None
    found = {}
    for file in files:
        known = native is not None and file.name in native.manifest["files"]  # others are by `save_pretrained`
        handle = native.open(file.name) if known else safe_open(file, framework="pt")
        found |= {tensor.name: tensor for tensor in tensors_of(handle)}
    return found
