"""Documents: what a page says, apart from how it is written down.

A `Document` is a title over sections of blocks; `markdown` and `html` write it whole, `latex` writes single blocks
into a template. Every grid and picture has a caption and names the gates that it stands on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Grid:
    """A table: the first column names, the others hold cells that are already text; None parts groups of rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str] | None]
    caption: str = ""
    stands_on: str = ""
    folded: bool = False  # long: closed until asked for, where the form can do that


@dataclass(frozen=True)
class Picture:
    """A PNG file."""

    path: Path
    caption: str = ""
    stands_on: str = ""


@dataclass(frozen=True)
class Bullets:
    lines: Sequence[str]


Block = str | Grid | Picture | Bullets  # a string is a paragraph


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    sections: Sequence[Section]
