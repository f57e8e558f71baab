"""What a user writes in a word: bytes, budgets, tuned strategies, paths."""

from __future__ import annotations

import os
import re

from bitalloc.errors import BitallocError, nearest

_UNITS = {"": 1, "B": 1} | {f"{p}{i}B": (1024 if i else 1000) ** e for e, p in enumerate("KMGT", 1) for i in ("", "i")}


def parse_bytes(text: str) -> int:
    """Bytes of "8GB", "8GiB" or "123".

    >>> parse_bytes("8GB"), parse_bytes("1.5KiB"), parse_bytes("123")
    (8000000000, 1536, 123)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if not match:
        raise BitallocError(f"cannot read {text!r} as bytes; write for example 8GB, 8GiB or 1200000")
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match[2].lower() not in units:
        raise BitallocError(f"unknown unit {match[2]!r} in {text!r}: {nearest(match[2], list(_UNITS)[1:])}")
    return round(float(match[1]) * units[match[2].lower()])


def budget_slug(text: str) -> str:
    """The budget in the names of plans.

    >>> budget_slug("2.6bpw"), budget_slug("8 GB"), budget_slug("uniform 3b  g64 r8"), budget_slug("8GB context 4096")
    ('2.6bpw', '8GB', 'uniform-3b-g64-r8', '8GB-context-4096')
    """
    text = " ".join(text.split())
    return text.replace(" ", "-") if text.startswith("uniform") or " context " in text else text.replace(" ", "")


def tuned_from(strategy: str) -> str | None:
    """The strategy whose map a tuned one keeps; None for one that is not tuned.

    >>> tuned_from("tuned"), tuned_from("tuned_uniform"), tuned_from("best")
    ('best', 'uniform', None)
    """
    if strategy != "tuned" and not strategy.startswith("tuned_"):
        return None
    return strategy.removeprefix("tuned").removeprefix("_") or "best"


def expand(text: str) -> str | None:
    """`text` with environment variables and ~ expanded; None when a variable is not set."""
    expanded = os.path.expanduser(os.path.expandvars(text))
    return None if re.search(r"\$\{?\w+", expanded) else expanded
