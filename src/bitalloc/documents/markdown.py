"""A document as Markdown; pictures are linked by name, beside the page."""

from __future__ import annotations

from collections.abc import Sequence

from bitalloc.documents import Block, Bullets, Document, Grid, Picture


def render(document: Document) -> str:
    parts = [f"# {document.title}"]
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts += [block(each) for each in section.blocks]
    return "\n\n".join(parts) + "\n"


def block(each: Block) -> str:
    match each:
        case Grid():
            return "\n\n".join(
                [grid(each.header, [row for row in each.rows if row]), *([each.caption] if each.caption else [])]
            )
        case Picture():
            caption = f"\n\n{each.caption}" if each.caption else ""
            return f"![{each.path.stem}]({each.path.name}){caption}"
        case Bullets():
            return "\n".join(f"- {line}" for line in each.lines)
        case _:
            return each


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(grid(("a", "b"), [("1", "2")]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])
