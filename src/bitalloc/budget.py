"""Budgets: "2.6bpw", "8GB", "uniform 3b g64 r8" or "24GB context 8192 batch 1" -> bytes for the claimed matrices."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import get_args

import pandas as pd

from bitalloc.config import Bits, Sweep, budget_slug, parse_bytes
from bitalloc.errors import BitallocError
from bitalloc.formats.carried import carries, rest_nbytes
from bitalloc.formats.carried import nbytes as carried_nbytes
from bitalloc.option import PASS_THROUGH, Option
from bitalloc.strategies import Instance

_UNIFORM = re.compile(r"uniform ([0-9]+)b(?: g([1-9][0-9]*))?(?: r([0-9]+))?")
_BPW = re.compile(r"([0-9]*\.?[0-9]+) ?bpw")
_CARD = re.compile(r"(.*?)(?: context ([1-9][0-9]*)(?: batch ([1-9][0-9]*))?)?")


@dataclass(frozen=True)
class Budget:
    """`nbytes` for the claimed matrices; `rest` bytes beside them if the text speaks of the whole checkpoint."""

    text: str
    nbytes: int
    rest: int = 0
    option: Option | None = None

    @property
    def slug(self) -> str:
        return budget_slug(self.text)


def limit(text: str, inventory: pd.DataFrame) -> int | None:
    """Bytes that a budget leaves to the whole checkpoint; None when it speaks of the claimed matrices alone.

    "24GB context 8192 batch 2" is the memory of a card, from which `serving_nbytes` goes off.
    """
    clean = " ".join(text.split())
    if _UNIFORM.fullmatch(clean) or _BPW.fullmatch(clean):
        return None
    memory, context, batch = _CARD.fullmatch(clean).groups()
    served = serving_nbytes(inventory, int(context), int(batch or 1)) if context else 0
    return parse_bytes(memory) - served


def serving_nbytes(inventory: pd.DataFrame, context: int, batch: int) -> int:
    """Bytes that a server needs beside the weights, an estimate: its cache, and the activations of one pass.

    Cache: keys and values of all tokens in 16 bits, as long as the context in every block. Activations: input and
    output of the widest matrix for all tokens of a pass in 16 bits, and the logits of the last ones in 32.
    """
    claimed = inventory[inventory["claimed"]]
    rows = claimed.groupby("role")["rows"].sum()
    cached = sum(int(rows.get(role, 0)) for role in ("k_proj", "v_proj")) + 2 * int(rows.get("c_attn", 0)) // 3
    widest = int((claimed["rows"] + claimed["columns"]).max())
    vocabulary = int(inventory.loc[inventory["kind"].isin(["embedding", "head"]), "rows"].max())
    return batch * (2 * context * (cached + widest) + 4 * vocabulary)


def parse_budget(
    text: str, instance: Instance, inventory: pd.DataFrame, sweep: Sweep, form: str = "bitalloc"
) -> Budget:
    """Bytes for the claimed matrices of "8GB" / "8GiB" (whole checkpoint), "2.6bpw" or "uniform 3b g64 r8".

    "24GB context 8192 batch 2" is the memory of a card that also serves: see `serving_nbytes`. A uniform budget
    without g takes the first group size of the sweep, without r no low-rank part. All bytes are those of `form`.
    Raises `BitallocError` for what cannot be read, for less than the smallest plan and for more than the largest.
    """
    clean = " ".join(text.split())
    if match := _UNIFORM.fullmatch(clean):
        budget = _uniform_budget(text, match, inventory, sweep, form=form)
    elif match := _BPW.fullmatch(clean):
        budget = Budget(text, math.floor(Fraction(match[1]) * int(instance.weights_N.sum()) / 8))
    else:
        try:
            total = limit(clean, inventory)
        except BitallocError as error:
            raise BitallocError(
                f"budget {text!r}: {error}; or 2.6bpw, or uniform 3b g64 r8, or 24GB context 8192 batch 1"
            ) from None
        rest = rest_nbytes(inventory, instance.options, sweep, form)
        budget = Budget(text, total - rest, rest)
    asked = f"budget {text} = {budget.nbytes + budget.rest:,} bytes"
    if budget.rest:
        asked += f" ({budget.rest:,} go to what is not claimed)"
    if budget.nbytes < instance.least:
        raise BitallocError(f"{asked} is below the least possible; {instance.reach(budget.rest)}")
    if budget.nbytes > instance.most:
        raise BitallocError(f"{asked} is above the largest plan, it changes nothing; {instance.reach(budget.rest)}")
    return budget


def _uniform_budget(text: str, match: re.Match, inventory: pd.DataFrame, sweep: Sweep, *, form: str) -> Budget:
    bits, group_size, rank = int(match[1]), int(match[2] or sweep.group_sizes[0]), int(match[3] or 0)
    if bits not in get_args(Bits):
        raise BitallocError(f"budget {text!r}: no code has {bits} bits; valid: {', '.join(map(str, get_args(Bits)))}")
    option = Option(sweep.quantizers[0], bits, group_size, rank, sweep.factor_bits, sweep.symmetric)
    if bits == 16:
        option = Option(PASS_THROUGH, 16, 0, 0)
    matrices = inventory[inventory["claimed"]]
    tables = matrices["kind"].isin(["embedding", "head"])  # which uniform plans leave at their most bits
    widest = max(sweep.embedding_bits)
    table = Option(PASS_THROUGH, 16, 0, 0) if widest == 16 else replace(option, bits=widest, rank=0)
    shapes = zip(matrices["rows"], matrices["columns"], tables, strict=True)
    if not carries(form, option):
        raise BitallocError(f"budget {text!r}: {form} has no place for {option.name}; leave the rank out")
    total = sum(
        carried_nbytes(form, table if apart else option, int(rows), int(columns)) for rows, columns, apart in shapes
    )
    return Budget(text, total, option=option)
