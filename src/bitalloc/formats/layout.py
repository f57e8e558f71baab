"""What the native checkpoint holds and how many bytes it takes, to the byte and without a tensor in memory.

One safetensors file for each block and one for the rest, so that writing and reading need one block in memory.
A matrix W_OI with G groups along its I inputs, b-bit codes and rank r is stored as

    <layer>.weight   U8   [O ceil(I b / 8)]      the codes, each row padded to a byte
    <layer>.scale    F16  [O, G]
    <layer>.zero     U8   [ceil(O G b / 8)]      unless symmetric
    <layer>.L, .R    I8   [O, r], [r, I]         rank > 0; F16 with 16-bit factors
    <layer>.L_scale, .R_scale  F16  [r]          rank > 0, 8-bit factors
    <layer>.weight   F16 or BF16  [O, I]         passed through

and every excluded tensor under its own name and type: vectors as [n], the filter of a depthwise convolution as
[channels, 1, taps], all else flattened to [rows, columns].
A head that is tied to the embedding and buffers that are recomputed are left out. Codes are flat and bear the name of
the weight so that software that does not know them fails on the shape instead of making the weight up.
Bytes are those of the weights files; the JSON files beside them (configuration, index, manifest) are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError, nearest
from bitalloc.option import PASS_THROUGH, Option, from_row

REST = "rest.safetensors"
METADATA = {"format": "pt"}  # transformers takes no other

# names of PyTorch -> (name in safetensors, bytes), in the order in which safetensors stores tensors
_DTYPES = {
    "int64": ("I64", 8),
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "int32": ("I32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
_ITEMSIZE = dict(_DTYPES.values())
_ORDER = {dtype: place for place, dtype in enumerate(_ITEMSIZE)}


class Stored(NamedTuple):
    """A tensor of the checkpoint; `dtype` as safetensors writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data.

        >>> Stored("x", "F16", (2, 3)).nbytes
        12
        """
        size = _ITEMSIZE[self.dtype]
        for length in self.shape:
            size *= length
        return size


Layout = dict[str, list[Stored]]


def block_file(block: int) -> str:
    """File of a block; -1 for what lies outside the blocks.

    >>> block_file(3), block_file(-1)
    ('block-00003.safetensors', 'rest.safetensors')
    """
    return REST if block < 0 else f"block-{block:05d}.safetensors"


def matrix_tensors(layer: str, rows: int, columns: int, option: Option, dtype: str = "F16") -> list[Stored]:
    """The tensors of one claimed matrix; `dtype` is that of a pass-through.

    >>> [(t.name, t.dtype, t.shape) for t in matrix_tensors("q", 128, 96, Option("gptq", 3, 64, 0))]
    [('q.weight', 'U8', (4608,)), ('q.scale', 'F16', (128, 2)), ('q.zero', 'U8', (96,))]
    """
    if option.quantizer == PASS_THROUGH:
        return [Stored(f"{layer}.weight", dtype, (rows, columns))]
    groups = -(-columns // option.group_size)
    tensors = [
        Stored(f"{layer}.weight", "U8", (rows * -(-columns * option.bits // 8),)),
        Stored(f"{layer}.scale", "F16", (rows, groups)),
    ]
    if not option.symmetric:
        tensors.append(Stored(f"{layer}.zero", "U8", (-(-rows * groups * option.bits // 8),)))
    if option.rank:
        factor = "I8" if option.factor_bits == 8 else "F16"
        tensors.append(Stored(f"{layer}.L", factor, (rows, option.rank)))
        tensors.append(Stored(f"{layer}.R", factor, (option.rank, columns)))
        if option.factor_bits == 8:
            tensors += [Stored(f"{layer}.{name}_scale", "F16", (option.rank,)) for name in "LR"]
    return tensors


def layout(
    inventory: pd.DataFrame, plan: pd.DataFrame, sweep: Sweep, *, matrix: Callable[..., list[Stored]] = matrix_tensors
) -> Layout:
    """File -> its tensors, in the order in which safetensors stores them; `matrix` says what a format makes of one.

    Raises `BitallocError` when plan and inventory do not speak of the same matrices, embeddings and heads apart.
    """
    options = {row["layer"]: from_row(row, sweep) for row in plan.to_dict("records")}
    inventory = claim(inventory, options)
    claimed = set(inventory.loc[inventory["claimed"], "layer"])
    if off := sorted(claimed ^ set(options)):
        raise BitallocError(f"plan and inventory differ in {off[0]} ({len(off)} matrices); make the plan again")
    files: Layout = {}
    for row in inventory.to_dict("records"):
        if row["claimed"]:
            dtype = "BF16" if row["dtype"] == "bfloat16" else "F16"
            tensors = matrix(row["layer"], row["rows"], row["columns"], options[row["layer"]], dtype)
        else:
            tensors = as_stored(row)
        if tensors:
            files.setdefault(block_file(row["block"]), []).extend(tensors)
    return {file: in_order(files[file]) for file in sorted(files)}


def claim(inventory: pd.DataFrame, layers: Iterable[str]) -> pd.DataFrame:
    """INVENTORY in which these embeddings or heads, too, are given an option."""
    chosen = inventory["layer"].isin(list(layers)) & inventory["tensor"].str.endswith(".weight") & ~inventory["tied"]
    chosen &= inventory["kind"].isin(["embedding", "head"]) & ~inventory["claimed"]
    return inventory.assign(claimed=inventory["claimed"] | chosen)


def in_order(tensors: Iterable[Stored]) -> list[Stored]:
    """As safetensors orders them."""
    return sorted(tensors, key=lambda tensor: (_ORDER[tensor.dtype], tensor.name))


def as_stored(row: dict[str, Any]) -> list[Stored]:
    """What is kept of an excluded tensor: one entry, or none."""
    if (row["tied"] and row["kind"] == "head") or row["kind"] == "buffer":
        return []
    if row["dtype"] not in _DTYPES:
        raise BitallocError(f"{row['tensor']} has the unknown type {row['dtype']!r}: {nearest(row['dtype'], _DTYPES)}")
    shape = (row["rows"],) if row["columns"] == 1 else (row["rows"], row["columns"])
    if row["kind"] == "filter":
        shape = (row["rows"], 1, row["columns"])
    return [Stored(row["tensor"], _DTYPES[row["dtype"]][0], shape)]


def nbytes(files: Layout, metadata: Mapping[str, str] = METADATA) -> int:
    """Bytes on disk of all files: length field, header, data."""
    return sum(len(header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors) for tensors in files.values())


def checkpoint_nbytes(inventory: pd.DataFrame, plan: pd.DataFrame, sweep: Sweep) -> int:
    """Bytes on disk of the native checkpoint's weights under `plan`, headers included."""
    return nbytes(layout(inventory, plan, sweep))


def header(tensors: Iterable[Stored], metadata: Mapping[str, str] = METADATA, *, start: int = 0) -> bytes:
    """The length field and the JSON header, padded with spaces to a multiple of 8, as safetensors writes them."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    for tensor in tensors:
        end = start + tensor.nbytes
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
