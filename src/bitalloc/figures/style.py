"""One look for all figures: canvas, marks of the strategies, labels that do not collide, and the file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bitalloc.store import write_atomically

DPI = 160
INK, GREY, LIGHT = "#222222", "#767676", "#c9c9c9"
LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.linewidth": 0.8,
    "figure.dpi": DPI,
}


@dataclass(frozen=True)
class Mark:
    """How a strategy is drawn: told apart by its shape, the colour (Okabe and Ito's palette) only helps."""

    marker: str
    colour: str
    label: str


MARKS = {
    "uniform": Mark("s", INK, "uniform"),
    "optimal": Mark("o", "#0072b2", "optimal"),
    "bits_only": Mark("^", "#d55e00", "bits only"),
    "rank_only": Mark("v", "#cc79a7", "rank only"),
    "manual": Mark("D", "#009e73", "manual"),
    "greedy": Mark("P", "#56b4e9", "greedy"),
    "best": Mark("o", INK, "best"),
    "tuned": Mark("*", INK, "tuned"),
}
SPARE = ("X", "<", ">", "p", "h", "d")


def mark(strategy: str) -> Mark:
    """The mark of a strategy; one that has none of its own gets a shape by its name."""
    return MARKS.get(strategy) or Mark(SPARE[sum(strategy.encode()) % len(SPARE)], GREY, strategy.replace("_", " "))


@contextmanager
def page(width: float, height: float, path: Path) -> Iterator[Figure]:
    """A figure of `width` x `height` inches that is written to `path` when the block ends without an error.

    The style starts from the library's defaults, whatever the user's own settings say.
    """
    with matplotlib.style.context(["default", LOOK]):
        figure = Figure(figsize=(width, height))
        canvas = FigureCanvasAgg(figure)
        yield figure
        buffer = io.BytesIO()
        # the version of the library would change the bytes
        canvas.print_png(buffer, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def headline(figure: Figure, sentence: str, footer: str, *, size: float = 12.5) -> tuple[float, float]:
    """Write the message above and the footer below, wrapped to the page; gives the room (bottom, top) left over."""
    width, height = figure.get_size_inches()
    titled, noted = _wrapped(sentence, footer, width, size)
    figure.text(0.3 / width, 1 - 0.2 / height, "\n".join(titled), size=size, weight="bold", va="top", linespacing=1.3)
    figure.text(0.3 / width, 0.12 / height, "\n".join(noted), size=7.5, color=GREY, va="bottom", linespacing=1.35)
    above, below = room(sentence, footer, width=width, size=size)
    return below / height, 1 - above / height


def room(sentence: str, footer: str, *, width: float = 13.5, size: float = 12.5) -> tuple[float, float]:
    """Inches that `headline` takes above and below."""
    titled, noted = _wrapped(sentence, footer, width, size)
    return 0.3 + len(titled) * size * 1.45 / 72, 0.22 + len(noted) * 7.5 * 1.45 / 72


def _wrapped(sentence: str, footer: str, width: float, size: float) -> tuple[list[str], list[str]]:
    return textwrap.wrap(sentence, int(width * 72 / (0.6 * size))), textwrap.wrap(
        footer, int(width * 72 / (0.53 * 7.5))
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions near the wanted ones, in their order, at least `gap` apart and within [low, high] if they fit.

    >>> spread([0.5, 0.5, 0.9], 0.1, 0.0, 1.0).round(2).tolist()
    [0.45, 0.55, 0.9]
    """
    order = np.argsort(wanted, kind="stable")
    # blocks of touching labels, each around the mean of what its members want
    blocks: list[list[float]] = []
    for value in np.asarray(wanted, dtype=float)[order]:
        blocks.append([value])
        while len(blocks) > 1 and _start(blocks[-2], gap) + gap * len(blocks[-2]) > _start(blocks[-1], gap):
            last = blocks.pop()
            blocks[-1] += last
    placed = np.concatenate([_start(block, gap) + gap * np.arange(len(block)) for block in blocks])
    steps = gap * np.arange(len(placed))
    placed = np.maximum(placed, low + steps)
    placed = np.minimum(placed, high - steps[::-1])
    positions = np.empty(len(placed))
    positions[order] = placed
    return positions


def _start(block: Sequence[float], gap: float) -> float:
    return float(np.mean(block)) - gap * (len(block) - 1) / 2


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], *, points: float = 8.5) -> None:
    """Name series beside their last points (x, y), spread apart, with a thin leader to each. Limits must stand."""
    height = axes.get_position().height * axes.figure.get_figheight() * 72
    fraction = axes.transAxes.inverted()
    heights = [fraction.transform(axes.transData.transform(end))[1] for end in ends.values()]
    for (name, end), y in zip(ends.items(), spread(heights, 1.25 * points / height, 0.02, 0.98), strict=True):
        axes.annotate(
            name,
            end,
            (1.03, y),
            textcoords="axes fraction",
            va="center",
            size=points,
            arrowprops={"arrowstyle": "-", "color": LIGHT, "lw": 0.7, "shrinkA": 1, "shrinkB": 4},
            annotation_clip=False,
        )


def option_name(bits: int, group_size: int, rank: int) -> str:
    """Short name of an option; 16 bits have neither groups nor rank.

    >>> option_name(3, 64, 8), option_name(3, 64, 0), option_name(16, 0, 0)
    ('3b g64 r8', '3b g64', '16b')
    """
    return f"{bits}b" + (f" g{group_size}" if group_size else "") + (f" r{rank}" if rank else "")


OPTION = ["bits", "group_size", "rank", "quantizer"]


def option_names(options: pd.MultiIndex) -> list[str]:
    """Names of options (levels as in `OPTION`); the quantiser is named where there are several."""
    several = options.get_level_values("quantizer").nunique() > 1
    return [option_name(*place) + (f" {quantizer}" if several else "") for *place, quantizer in options]


def software(versions: str) -> str:
    """Of the versions in RECORDS those that a footer has room for.

    >>> software("python 3.11.7; machine x86_64; torch 2.13.0; transformers 5.17.0; numpy 2.4.6")
    'python 3.11.7, torch 2.13.0, transformers 5.17.0'
    """
    named = ("python", "torch", "transformers", "mamba-ssm")
    return ", ".join(part for part in versions.split("; ") if part.partition(" ")[0] in named)


def stamp(gates: pd.DataFrame) -> str:
    """Verdicts in one line: how many checks say GO, and every NO-GO by name with what was measured."""
    refused = gates[~gates["go"].astype(bool)].astype({"value": float})  # what could not be measured shows as nan
    named = [
        f"NO-GO {row.check} {row.value:.3g} (must be {row.comparison} {row.threshold:g}; {row.mode})"
        for row in refused.itertuples()
    ]
    return "; ".join([f"Gates: {len(gates) - len(refused)} of {len(gates)} GO", *named])
