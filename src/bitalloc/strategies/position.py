"""Position: what is kept at high precision by its place in the model alone, no measurement asked.

Rules of thumb as precision maps, for a model of any depth. Like `component` they are no allocations: at no budget.
`early`, `early_0`, `middle` and `late` keep equally many MLPs, ceil(n/4) of n blocks, hence equally many bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from bitalloc.errors import BitallocError, nearest
from bitalloc.precision import BITS, DEFAULT, HALF

LEAST = 4  # blocks below which early, middle and late are not three places


def kept(blocks: int) -> int:
    """MLPs that a rule keeps: ceil(n/4).

    >>> [f"{kept(n)} of {n}" for n in (6, 12, 24, 36)]
    ['2 of 6', '3 of 12', '6 of 24', '9 of 36']
    """
    return -(-blocks // 4)


def _mlps(first: int, blocks: int) -> str:
    last = first + kept(blocks) - 1
    return f"h.{first}.mlp" if last == first else f"h.{first}-h.{last}.mlp"


RULES: dict[str, Callable[[int], list[str]]] = {  # what stays high, of n blocks
    "all_high": lambda n: [DEFAULT],
    "all_low": lambda n: [],
    "early": lambda n: [_mlps(1, n)],  # the first MLPs without block 0
    "early_0": lambda n: [_mlps(0, n)],  # with it
    "middle": lambda n: [_mlps(-(-(n - kept(n)) // 2), n)],
    "late": lambda n: [_mlps(n - kept(n), n)],
    "last": lambda n: [f"h.{n - 1}"],  # the whole last block
    "champion": lambda n: [_mlps(1, n), f"h.{n - 1}.attn"],  # early, and the attention of the last block
}


def position(rule: str, blocks: int, *, high: str = HALF, low: str = "int8") -> dict[str, str]:
    """The precision map of a rule for a model of that many blocks; all that it does not keep takes `low`.

    Raises `BitallocError` for an unknown rule, and for a model too shallow to have an early, a middle and a late part.

    >>> position("early", 12)
    {'default': 'int8', 'h.1-h.3.mlp': 'fp16'}
    >>> [list(position(rule, 12))[1] for rule in ("early_0", "middle", "late", "last")]
    ['h.0-h.2.mlp', 'h.5-h.7.mlp', 'h.9-h.11.mlp', 'h.11']
    """
    if rule not in RULES:
        raise BitallocError(f"unknown rule {rule!r}: {nearest(rule, RULES)}")
    for precision in (high, low):
        if precision not in BITS:
            raise BitallocError(f"unknown precision {precision!r}: {nearest(precision, BITS)}")
    if blocks < LEAST:
        raise BitallocError(f"a model of {blocks} blocks has no early, middle and late part; {LEAST} are needed")
    return {DEFAULT: low} | dict.fromkeys(RULES[rule](blocks), high)
