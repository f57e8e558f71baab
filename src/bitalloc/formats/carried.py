"""What a matrix takes in the format of other software, to the byte and without a tensor in memory.

The formats' own modules say what the tensors hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pandas as pd

from bitalloc.config import Sweep
from bitalloc.formats.layout import Layout, Stored, as_stored, header, layout, matrix_tensors
from bitalloc.formats.layout import nbytes as total
from bitalloc.option import PASS_THROUGH, Option

LORA = "base_model.model."  # before the names that peft gives
BLOCK, K_BLOCK = 32, 256  # weights that share a scale in GGUF
SERVED = (2, 3, 4, 8)  # bits of codes that servers read, packed as the formats huggingface and gptq have them
BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}  # bits a weight, scales counted
K_BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}


# ---- huggingface ---------------------------------------------------------------------------------------
def compressed_tensors(layer: str, rows: int, columns: int, option: Option) -> list[Stored]:
    """The tensors of a matrix of codes, its low-rank part apart."""
    groups = -(-columns // option.group_size)
    tensors = [
        Stored(f"{layer}.weight_packed", "I32", (rows, -(-columns * option.bits // 32))),
        Stored(f"{layer}.weight_scale", "F16", (rows, groups)),
        Stored(f"{layer}.weight_shape", "I64", (2,)),
    ]
    zero = Stored(f"{layer}.weight_zero_point", "I32", (-(-rows * option.bits // 32), groups))
    return tensors if option.symmetric else [*tensors, zero]


def lora_tensors(layer: str, rows: int, columns: int, option: Option) -> list[Stored]:
    """Those of the adapter; none at rank 0."""
    if not option.rank:
        return []
    return [
        Stored(f"{LORA}{layer}.lora_A.weight", "F16", (option.rank, columns)),
        Stored(f"{LORA}{layer}.lora_B.weight", "F32" if option.factor_bits == 8 else "F16", (rows, option.rank)),
    ]


def index(files: Layout) -> bytes:
    """`model.safetensors.index.json`: which file holds which tensor."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    where = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _huggingface(layer: str, rows: int, columns: int, option: Option, dtype: str = "F16") -> list[Stored]:
    if option.quantizer == PASS_THROUGH:
        return matrix_tensors(layer, rows, columns, option, dtype)
    parts = (layer, rows, columns, option)
    return [*compressed_tensors(*parts), *lora_tensors(*parts)]


# ---- gptq ----------------------------------------------------------------------------------------------
def gptq_tensors(layer: str, rows: int, columns: int, option: Option, dtype: str = "F16") -> list[Stored]:
    """The tensors of a matrix without rank."""
    if option.quantizer == PASS_THROUGH:
        return matrix_tensors(layer, rows, columns, option, dtype)
    bits, groups = option.bits, -(-columns // option.group_size)
    return [
        Stored(f"{layer}.qweight", "I32", (columns * bits // 32, rows)),
        Stored(f"{layer}.qzeros", "I32", (groups, rows * bits // 32)),
        Stored(f"{layer}.scales", "F16", (groups, rows)),
        Stored(f"{layer}.g_idx", "I32", (columns,)),
    ]


# ---- gguf: which type ----------------------------------------------------------------------------------
def through(option: Option, columns: int) -> str | None:
    """The type that holds the codes of this option as they are, if there is one.

    >>> through(Option("gptq", 3, 64, 0), 128), through(Option("gptq", 4, 32, 0), 128)
    ('Q4_0', 'Q4_1')
    >>> through(Option("gptq", 8, 32, 0, symmetric=True), 128), through(Option("gptq", 3, 64, 8), 128)
    ('Q8_0', None)
    """
    if option.quantizer == PASS_THROUGH or option.rank or option.group_size % BLOCK or columns % BLOCK:
        return None
    exact = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0" if option.symmetric else "Q4_1"}
    return (exact | ({8: "Q8_0"} if option.symmetric else {})).get(option.bits)


def coded(option: Option, rows: int, columns: int, *, k_quants: bool = False) -> str:
    """The type of a matrix that is not passed through: that of its codes, else the nearest above its bits a weight.

    Rows that are no multiple of 32 long fit no quantised type: F16. K-quants take multiples of 256, and codes go
    through only where that takes no more.

    >>> coded(Option("gptq", 4, 128, 32), 1024, 1024), coded(Option("gptq", 2, 32, 0), 64, 172)
    ('Q4_1', 'F16')
    >>> coded(Option("gptq", 2, 128, 0), 1024, 1024), coded(Option("gptq", 2, 128, 0), 1024, 1024, k_quants=True)
    ('Q4_0', 'Q2_K')
    """
    if columns % BLOCK:
        return "F16"
    types = K_BITS if k_quants and columns % K_BLOCK == 0 else BITS
    paid = 8 * option.nbytes(rows, columns) / (rows * columns)
    nearest = next((name for name, bits in types.items() if bits >= paid), "Q8_0")
    exact = through(option, columns)
    return exact if exact and (types is BITS or BITS[exact] <= types[nearest]) else nearest


def _gguf(layer: str, rows: int, columns: int, option: Option, dtype: str = "F16") -> list[Stored]:
    kind = "F16" if option.quantizer == PASS_THROUGH else coded(option, rows, columns)
    if kind == "F16":
        return [Stored(layer, "F16", (rows, columns))]
    return [Stored(layer, "U8", (rows, round(columns * BITS[kind] / 8)))]


CARRIED: dict[str, Callable[..., list[Stored]]] = {
    "bitalloc": matrix_tensors,
    "huggingface": _huggingface,
    "gptq": gptq_tensors,
    "gguf": _gguf,
}


def nbytes(form: str, option: Option, rows: int, columns: int) -> int:
    """Bytes of a matrix in a format, headers not counted.

    >>> option = Option("gptq", 3, 64, 8)
    >>> [nbytes(form, option, 128, 128) for form in ("bitalloc", "huggingface", "gguf")]
    [8832, 12912, 9216]
    """
    return sum(tensor.nbytes for tensor in CARRIED[form]("", rows, columns, option))


def carries(form: str, option: Option, *, table: bool = False) -> bool:
    """Whether a format has a place for the option of a matrix, or of an embedding or head (`table`).

    >>> carries("gptq", Option("gptq", 3, 64, 8)), carries("huggingface", Option("gptq", 4, 64, 0), table=True)
    (False, False)
    >>> [carries(form, Option("gptq", 5, 64, 0)) for form in ("bitalloc", "gguf", "huggingface")]
    [True, True, False]
    """
    if form not in ("huggingface", "gptq") or option.quantizer == PASS_THROUGH:
        return True
    return not table and option.bits in SERVED and not (form == "gptq" and option.rank)


def rest_nbytes(inventory: pd.DataFrame, options: Iterable[Option], sweep: Sweep, form: str = "bitalloc") -> int:
    """Bytes that a checkpoint takes beside its claimed matrices: at most this under any plan of these options.

    What is excluded is known to the byte. Headers depend on the plan by some digits: they are taken for the option
    with the most and largest tensors, at offsets as large as those of a checkpoint of 16-bit matrices. The words of
    a tokenizer, which GGUF holds too, are not counted.
    """
    coded = [option for option in options if option.quantizer != PASS_THROUGH]
    widest = Option(
        "widest",
        max((option.bits for option in coded), default=2),
        min((option.group_size for option in coded), default=1),
        max((option.rank for option in coded), default=0),
    )
    plan = inventory.loc[inventory["claimed"], ["layer"]].assign(
        quantizer=widest.quantizer, bits=widest.bits, group_size=widest.group_size, rank=widest.rank
    )
    files = layout(inventory, plan, sweep, matrix=CARRIED[form])
    far = 2 * int((inventory["rows"] * inventory["columns"]).sum()) + total(files)
    adapter = [tensor for tensors in files.values() for tensor in tensors if tensor.name.startswith(LORA)]
    files = {file: [t for t in tensors if not t.name.startswith(LORA)] for file, tensors in files.items()}
    headers = sum(len(header(tensors, start=far)) for tensors in (*files.values(), *([adapter] if adapter else [])))
    if form == "huggingface":
        headers += len(index(files))
    kept = (t for row in inventory[~inventory["claimed"]].to_dict("records") for t in as_stored(row))
    return headers + sum(tensor.nbytes for tensor in kept)
