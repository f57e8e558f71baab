"""Export: a checkpoint in a format that other software loads, of the size that was computed before -> EXPORTS.

`python -m bitalloc.export results/tiny/models/best-2.3bpw my-model --to huggingface`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pandas as pd

from bitalloc.errors import BitallocError, nearest
from bitalloc.formats import gguf, gptq, huggingface
from bitalloc.formats.bitalloc import Reader
from bitalloc.tables import EXPORTS


class Format(Protocol):
    """What a module of bitalloc.formats offers."""

    def refuse(self, reader: Reader) -> None:
        """Raise `BitallocError`, naming a format that can, for a plan that cannot be carried."""

    def nbytes(self, reader: Reader, **how: bool) -> int:
        """Bytes on disk of what `save` will write, configuration and tokenizer not counted."""

    def save(self, target: Path, reader: Reader, *, card: str = "", **how: bool) -> None:
        """Write it, all or nothing; `how` is the format's own."""

    def measure(self, target: Path) -> int:
        """Bytes on disk of what `nbytes` counts."""


FORMATS: dict[str, Format] = {"huggingface": huggingface, "gguf": gguf, "gptq": gptq}


def export(
    source: Path,
    target: Path,
    *,
    name: str,
    card: Callable[[int], str] | None = None,
    limit: int | None = None,
    k_quants: bool = False,
) -> pd.DataFrame:
    """Export the native checkpoint `source`: one row of EXPORTS; `limit` is its budget in bytes, if it has one.

    `card` makes the model card, given the bytes on disk. `k_quants` is for gguf: see there.

    Raises `BitallocError` for a format that is unknown or cannot carry the plan, for a target that exists, for
    an export above the limit (before anything is written), and when the disk is full.
    """
    if name not in FORMATS:
        raise BitallocError(f"unknown format {name!r}: {nearest(name, FORMATS)}")
    if target.exists():
        raise BitallocError(f"{target} exists; delete it or write elsewhere")
    reader, form = Reader(source), FORMATS[name]
    form.refuse(reader)
    how = {"k_quants": True} if k_quants and name == "gguf" else {}
    promised = form.nbytes(reader, **how)
    if limit is not None and promised > limit:
        raise BitallocError(
            f"{source.name} takes {promised} bytes as {name}, {promised - limit} above its budget of {limit}; allocate "
            "for a smaller one (with `sweep.factor_bits: 16` this format adds least)"
        )
    form.save(target, reader, card=card(promised) if card else "", **how)
    nbytes = form.measure(target)
    if nbytes != promised:
        raise BitallocError(f"{target} takes {nbytes} bytes, {promised} were promised; report this")
    return pd.DataFrame([(source.name, name, target.name, promised, nbytes)], columns=EXPORTS.names)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bitalloc.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder of results/<model>/models")
    parser.add_argument("target", type=Path, help="what to write; must not exist")
    parser.add_argument("--to", default="huggingface", choices=FORMATS, help="format")
    parser.add_argument("--k-quants", action="store_true", help="gguf: smaller types, by llama.cpp's own quantiser")
    given = parser.parse_args(arguments)
    row = export(given.source, given.target, name=given.to, k_quants=given.k_quants).iloc[0]
    print(f"{given.target}: {row['nbytes']} bytes, as computed before")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BitallocError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
