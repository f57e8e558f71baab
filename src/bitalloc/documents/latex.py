"""Blocks as LaTeX, and Jinja templates in which braces and percent signs are LaTeX's own.

`<< value >>` is escaped unless it is `Latex`; `<% statement %>` and `<# comment #>` are Jinja's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from bitalloc.documents import Grid

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}", '"': "''",
    "≤": r"$\le$", "≥": r"$\ge$", "±": r"$\pm$", "×": r"$\times$", "−": r"$-$", "²": r"$^2$", "Δ": r"$\Delta$",
    "ρ": r"$\rho$", "–": "--", "—": "---", "’": "'", "…": r"\ldots{}", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


class Latex(str):
    """Text that is LaTeX already."""


def render(template: str, values: Mapping[str, Any]) -> str:
    environment = Environment(
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
        comment_start_string="<#", comment_end_string="#>", trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Latex) else Latex(escape(str(value))),
    )  # fmt: skip
    environment.filters |= {each.__name__: each for each in (table, longtable, figure, names, code)} | {
        "latex": lambda text: Latex(text.strip())
    }
    return environment.from_string(template).render(values)


def escape(text: str) -> Latex:
    r"""Any text as LaTeX text; what pdfLaTeX has no sign for becomes a question mark.

    >>> print(escape("bits_only: 5 % < 6 & R² ≥ .8"))
    bits\_only: 5\,\% $<$ 6 \& R$^2$ $\ge$ .8
    >>> print(escape("{a\\b}^~"), escape("世界"))
    \{a\textbackslash{}b\}\textasciicircum{}\textasciitilde{} ??
    """
    spelled = (_SPECIAL.get(sign, sign if ord(sign) < 256 else "?") for sign in text.replace("+-", "±"))
    # a minus before a number is no hyphen, and a number keeps its sign of percent
    escaped = re.sub(r"(?<![\w-])-(?=\d)", lambda _: "$-$", "".join(spelled))
    return Latex(re.sub(r"(?<=[\d\]]) \\%", r"\\,\\%", escaped))


def code(text: str) -> Latex:
    r"""
    >>> print(code("read `a_b`"))
    read \texttt{a\_b}
    """
    return Latex(re.sub(r"`([^`]+)`", r"\\texttt{\1}", escape(text)))


def names(words: Sequence[str]) -> str:
    """
    >>> names(["a", "b", "c"]), names(["a"])
    ('a, b and c', 'a')
    """
    words = [str(word) for word in words]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def table(grid: Grid, label: str, caption: str = "") -> Latex:
    """The grid as a float no wider than the text, by the template's command `fit`; nothing where it has no rows."""
    if not grid.rows:
        return Latex()
    under = _caption(caption or grid.caption, grid.stands_on, f"tab:{label}")
    return Latex(f"\\begin{{table}}[htbp]\n\\centering\\small\n\\fit{{{tabular(grid)}}}\n{under}\n\\end{{table}}")


def figure(captions: Mapping[str, str], name: str, stands_on: str) -> Latex:
    """The figure of this name beside the paper, as a float no larger than a page; nothing where it has no caption."""
    if name not in captions:
        return Latex()
    image = rf"\includegraphics[width=\linewidth,height=.8\textheight,keepaspectratio]{{{name}.png}}"
    under = _caption(captions[name], stands_on, f"fig:{name}")
    return Latex(f"\\begin{{figure}}[htbp]\n\\centering\n{image}\n{under}\n\\end{{figure}}")


def _caption(text: str, stands_on: str, label: str) -> str:
    gates = f" Gates: {stands_on}." if stands_on else ""
    return rf"\caption{{{code(text + gates)}}}\label{{{label}}}"


def tabular(grid: Grid) -> Latex:
    r"""The grid without its caption, for booktabs; the first column to the left, columns of words too.

    >>> print(tabular(Grid(("a", "b"), [("x_1", "2.0")])))
    \begin{tabular}{lr}
    \toprule
    a & b \\
    \midrule
    x\_1 & 2.0 \\
    \bottomrule
    \end{tabular}
    """
    head, *lines = _lines(grid)
    return Latex("\n".join([
        rf"\begin{{tabular}}{{{_columns(grid)}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule",
        r"\end{tabular}",
    ]))  # fmt: skip


def longtable(grid: Grid, label: str) -> Latex:
    """The grid with its caption, over as many pages as it takes."""
    head, *lines = _lines(grid)
    top = [r"\toprule", head, r"\midrule"]
    return Latex("\n".join([
        rf"\begin{{longtable}}{{{_columns(grid)}}}", rf"\caption{{{code(grid.caption)}}}\label{{tab:all-{label}}}\\",
        *top, r"\endfirsthead", *top, r"\endhead", r"\bottomrule", r"\endfoot", *lines, r"\end{longtable}",
    ]))  # fmt: skip


def _lines(grid: Grid) -> list[str]:
    """Header and rows."""
    return [" & ".join(map(escape, row)) + r" \\" if row else r"\addlinespace" for row in (grid.header, *grid.rows)]


def _columns(grid: Grid) -> str:
    first = (
        "l" if max(len(row[0]) for row in grid.rows if row) <= 40 else r">{\raggedright\arraybackslash}p{.32\linewidth}"
    )
    return "".join([first, *("r" if _numbers(grid, i) else "l" for i in range(1, len(grid.header)))])


def _numbers(grid: Grid, column: int) -> bool:
    return all(re.match(r"[-−≤≥(]?\s?\.?[\d-]|$", row[column]) for row in grid.rows if row)
