"""Precision maps: a plan in a few lines, `{"h.1-h.3.mlp": "fp16", "h.11.attn": "fp16", "default": "int8"}`.

Components have GPT-2's short names in every family: `wte` (embedding), `wpe` (positions), `h.3.attn`, `h.3.mlp` or
`h.3.mixer` (of block 3), `ln_f` (the norm before the head), `lm_head` (a head of its own; a tied one is `wte`). A key
is a component, a block (`h.3`), a range of either (`h.7-h.23`, `h.7-h.23.mlp`), or several with commas. What no key
names takes `default`, and `fp16` where there is none.

`fp16` and `bf16` pass a matrix through in the half type of its checkpoint. `fp32` does so too and is counted as four
bytes: the pipeline stores no matrix in more than 16 bits. `int8`, `int4`, `int3`, `int2` are `quant.absmax`, symmetric,
one scale a row. Vectors (biases, norms) are never rounded; norms inside a block belong to no component.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bitalloc.errors import BitallocError, nearest
from bitalloc.option import ABSMAX, PASS_THROUGH, Option

BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
DEFAULT, HALF = "default", "fp16"
PARTS = {"attention": "attn", "mlp": "mlp", "mixer": "mixer"}  # kind of a matrix -> part of its block

_KEY = re.compile(r"h\.([0-9]+)(?:-h\.([0-9]+))?(?:\.([a-z]+))?")
_POSITIONS = ("wpe", "embed_positions")
_ENDS = ("wte", "wpe", "project_in", "project_out")  # before the blocks, in the order of the forward pass


def components(inventory: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Component -> names of its tensors, in the order of the forward pass."""
    matrices = inventory[inventory["tensor"].str.endswith(".weight") & ~inventory["tied"]]
    name = {row.layer: _name(row) for row in matrices.itertuples()}
    found: dict[str, list[str]] = {}
    for row in inventory[inventory["kind"] != "buffer"].itertuples():
        if component := name.get(row.layer):
            found.setdefault(component, []).append(row.tensor)
    return {component: tuple(found[component]) for component in sorted(found, key=_order)}


def _name(row: Any) -> str:
    """Component of the weight in a row of INVENTORY; empty for a vector inside a block."""
    if row.claimed:
        return f"h.{row.block}.{PARTS[row.kind]}"
    leaf = row.layer.rpartition(".")[2]
    if row.kind == "embedding":
        return "wpe" if leaf in _POSITIONS else leaf if leaf in _ENDS else "wte"
    return "lm_head" if row.kind == "head" else "" if row.block >= 0 else "ln_f"


def rounded(inventory: pd.DataFrame) -> pd.DataFrame:
    """The rows of INVENTORY that a map may round: claimed matrices, and what is an embedding or a head."""
    ends = inventory["kind"].isin(["embedding", "head"]) & inventory["tensor"].str.endswith(".weight")
    return inventory[inventory["claimed"] | (ends & ~inventory["tied"])]


def _order(component: str) -> tuple[int, int, str]:
    if component.startswith("h."):
        _, block, part = component.split(".")
        return 1, int(block), part
    return (0, _ENDS.index(component), "") if component in _ENDS else (2, component == "lm_head", "")


def parse(given: Mapping[str, str] | Path, known: Mapping[str, Any]) -> dict[str, str]:
    """{component: precision} for every component of `known`, from a map or a .json or .yaml file that holds one.

    Raises `BitallocError` for an unknown precision, a component or block that the model lacks, and two keys that name
    one component.

    >>> parse({"h.0-h.1.mlp": "int8", "default": "fp16"}, dict.fromkeys(["wte", "h.0.attn", "h.0.mlp", "h.1.mlp"]))
    {'wte': 'fp16', 'h.0.attn': 'fp16', 'h.0.mlp': 'int8', 'h.1.mlp': 'int8'}
    """
    where = "precision map"
    if isinstance(given, Path):
        where, given = str(given), _load(given)
    found: dict[str, str] = {}  # component -> the key that names it
    for key, precision in given.items():
        if precision not in BITS:
            raise BitallocError(f"{where}: unknown precision {precision!r} of {key}: {nearest(str(precision), BITS)}")
        for component in _named(key, known, where) if key != DEFAULT else ():
            if component in found:
                raise BitallocError(f"{where}: {found[component]!r} and {key!r} both name {component}; remove one")
            found[component] = key
    default = given.get(DEFAULT, HALF)
    return {component: given[found[component]] if component in found else default for component in known}


def _named(key: str, known: Mapping[str, Any], where: str) -> Iterator[str]:
    """Components that a key names."""
    blocks = 1 + max((int(name.split(".")[1]) for name in known if name.startswith("h.")), default=-1)
    for word in key.replace(" ", "").split(","):
        if word in known:
            yield word
            continue
        if not (match := _KEY.fullmatch(word)):
            raise BitallocError(f"{where}: no component {word!r}: {nearest(word, known)}")
        first, last, part = int(match[1]), int(match[2] or match[1]), match[3]
        if last < first:
            raise BitallocError(f"{where}: {word!r} ends before it begins; write h.{last}-h.{first}")
        if last >= blocks:
            raise BitallocError(f"{where}: {word!r} names block {last}, the model has h.0 to h.{blocks - 1}")
        for block in range(first, last + 1):
            parts = [name for name in known if name.startswith(f"h.{block}.") and part in (None, name.split(".")[2])]
            if not parts:
                lacking = f"h.{block}.{part}"
                raise BitallocError(f"{where}: no component {lacking!r}: {nearest(lacking, known)}")
            yield from parts


def _load(path: Path) -> dict[str, str]:
    """A map from a file; a key that is there twice is no map."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise BitallocError(f"{path}: {twice[0]!r} stands there twice; remove one")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=once) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BitallocError(f"cannot read the precision map {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(item, str) for pair in found.items() for item in pair):
        raise BitallocError(f'{path} is no precision map; write {{"h.0-h.3.mlp": "fp16", "default": "int8"}}')
    return found


def compact(mapping: Mapping[str, str]) -> dict[str, str]:
    """The same map in few keys: consecutive blocks that are alike become a range. `parse` is its inverse.

    >>> compact({"wte": "int8", "h.0.attn": "int8", "h.0.mlp": "int8", "h.1.attn": "int8", "h.1.mlp": "int8"})
    {'wte': 'int8', 'h.0-h.1': 'int8'}
    >>> compact({"h.0.attn": "int8", "h.0.mlp": "fp16", "h.1.attn": "int8", "h.1.mlp": "fp16"})
    {'h.0-h.1.attn': 'int8', 'h.0-h.1.mlp': 'fp16'}
    """
    blocks: dict[int, dict[str, str]] = {}
    for component, precision in mapping.items():
        if component.startswith("h."):
            _, block, part = component.split(".")
            blocks.setdefault(int(block), {})[part] = precision
    written = {c: precision for c, precision in mapping.items() if _order(c)[0] == 0}
    # consecutive numbers have the same distance from their place in the order
    alike = groupby(enumerate(sorted(blocks)), key=lambda pair: (pair[1] - pair[0], sorted(blocks[pair[1]].items())))
    for _, run in alike:
        numbers = [block for _, block in run]
        name = f"h.{numbers[0]}" if len(numbers) == 1 else f"h.{numbers[0]}-h.{numbers[-1]}"
        parts = blocks[numbers[0]]
        one = len(set(parts.values())) == 1
        written |= {name: next(iter(parts.values()))} if one else {f"{name}.{part}": parts[part] for part in parts}
    return written | {c: precision for c, precision in mapping.items() if _order(c)[0] == 2}


def option(precision: str, columns: int) -> Option:
    """How a matrix of that many inputs is stored.

    >>> option("int8", 768).name, option("fp32", 768).name
    ('absmax-8b-g768-r0', 'none-16b-g0-r0')
    """
    if BITS[precision] >= 16:
        return Option(PASS_THROUGH, 16, 0, 0)
    return Option(ABSMAX, BITS[precision], columns, 0)


def plan(inventory: pd.DataFrame, mapping: Mapping[str, str]) -> pd.DataFrame:
    """The PLAN frame of a map that names every component. Costs are unknown: nobody has measured them.

    An embedding or a head of 16 bits has no row: it stays as it is stored.
    """
    of = {tensor: mapping[name] for name, tensors in components(inventory).items() for tensor in tensors}
    rows = []
    for row in rounded(inventory).itertuples():
        if row.claimed or BITS[of[row.tensor]] < 16:
            chosen = option(of[row.tensor], row.columns)
            place = {"layer": row.layer, "block": row.block, "role": row.role or row.kind}
            place |= {name: getattr(chosen, name) for name in ("quantizer", "bits", "group_size", "rank")}
            rows.append(place | {"nbytes": chosen.nbytes(row.rows, row.columns), "cost_nats_per_token": math.nan})
    return pd.DataFrame(rows)


def nbytes(inventory: pd.DataFrame, mapping: Mapping[str, str], *, scales: bool = True) -> int:
    """Bytes of all tensors under a map that names every component, a tied head once, file headers not counted.

    Codes of `bits` bits, each row padded to a byte; 4 bytes for fp32, else 2, for what is not rounded. Published sizes
    mostly leave out the scales (2 bytes a row).
    """
    of = {tensor: mapping[name] for name, tensors in components(inventory).items() for tensor in tensors}
    matrices, total = set(rounded(inventory)["tensor"]), 0
    for row in inventory[(inventory["kind"] != "buffer") & ~inventory["tied"]].itertuples():
        bits = BITS[of.get(row.tensor, HALF)]
        if bits < 16 and row.tensor in matrices:
            total += row.rows * (-(-row.columns * bits // 8) + 2 * scales)
        else:
            total += max(2, bits // 8) * row.rows * row.columns
    return total
