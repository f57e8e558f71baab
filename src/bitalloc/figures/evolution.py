"""Evolution: the champion's fitness by generation, and the last champion as a map of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bitalloc.config import Evolve
from bitalloc.figures.style import GREY, INK, LIGHT, headline, page

SHADE = {
    "fp32": "#1a1a1a",
    "fp16": "#4d4d4d",
    "bf16": "#4d4d4d",
    "int8": "#9a9a9a",
    "int4": "#cfcfcf",
    "int3": "#e6e6e6",
}
PAPER = "#f7f7f7"  # two bits


def evolution(frame: pd.DataFrame, champion: Mapping[str, str], path: Path, settings: Evolve, *, model: str) -> None:
    """EVOLUTION and component -> precision -> PNG: fitness on both splits by generation, and the map."""
    rows = _rows(champion)
    width, height = 13.5, 4.4 + 0.18 * max(0, len(rows) - 5)
    best = frame.loc[frame["fitness"].idxmax()]
    count = frame.groupby("seed")["evaluations"].max()
    scale = "-degradation" if settings.budget else f"{settings.penalty:g} x degradation off compression"
    footer = (
        f"{model}; {len(count)} seed{'s' * (len(count) > 1)}, {int(count.max()):,} genomes each. Fitness: {scale}, "
        f"degradation by {'perplexity' if settings.fitness == 'ppl' else 'KL'}. Bytes with scales, a tied head "
        f"once. The fittest champion on the report split: PPL {best['report_ppl']:.3f} of "
        f"{best['report_reference_ppl']:.3f}, KL {best['report_kl_nats_per_token']:.3g} nats a token."
    )
    with page(width, height, path) as figure:
        bottom, top = headline(figure, sentence(frame), footer)
        bottom, top = bottom + 0.55 / height, top - 0.3 / height
        _fitness(figure.add_axes((0.062, bottom, 0.36, top - bottom)), frame, settings)
        _map(figure.add_axes((0.53, bottom, 0.455, top - bottom)), rows)


def sentence(frame: pd.DataFrame) -> str:
    """What the page says: where the search ends, and whether the report split agrees."""
    best = frame.loc[frame["fitness"].idxmax()]
    lost, held = (100 * (best[f"{split}ppl"] / best[f"{split}reference_ppl"] - 1) for split in ("", "report_"))
    start = frame[frame["seed"] == best["seed"]].iloc[0]
    return (
        f"Evolution ends at {best['compression']:.2f}x for {lost:+.1f} % PPL on the windows that chose it, "
        f"{held:+.1f} % on others; fitness {start['fitness']:.3f} to {best['fitness']:.3f}"
    )


def report_fitness(frame: pd.DataFrame, settings: Evolve, end: str = "") -> pd.Series:
    """The champion's fitness had the report windows been asked; `end` lo or hi: with that end of the loss."""
    if settings.fitness == "kl":
        lost = np.expm1(frame["report_kl_nats_per_token"])
    else:
        lost = np.expm1(frame[f"report_loss_{end}" if end else "report_loss_nats_per_token"]).clip(lower=0)
    return -lost if settings.budget else frame["compression"] - settings.penalty * lost


def _fitness(axes: Axes, frame: pd.DataFrame, settings: Evolve) -> None:
    best = frame.loc[frame["fitness"].idxmax(), "seed"]
    for seed, part in frame.groupby("seed"):
        mine, x, moved = seed == best, part["generation"], part["changed"] != ""
        colour = INK if mine else LIGHT
        axes.step(
            x, part["fitness"], where="post", color=colour, lw=1.4, label="select, which chooses" if mine else None
        )
        axes.plot(x[moved], part["fitness"][moved], "o", color=colour, ms=3.5)
        if mine:
            ends = (report_fitness(part, settings, end) for end in ("lo", "hi"))
            axes.fill_between(x, *ends, step="post", color="#d0d0d0", lw=0, alpha=0.7)
            held = report_fitness(part, settings)
            axes.step(x, held, where="post", color=GREY, lw=1.2, ls="--", label="report, 95 % over windows")
    axes.set_xlabel("generation")
    axes.set_ylabel("fitness of the champion")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("Champion by generation; a dot where it changed")


def _rows(champion: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """Part -> block -> precision; what is outside the blocks has a row of its own, at block -1."""
    rows: dict[str, dict[int, str]] = {}
    for name, level in champion.items():
        part, block = (name.split(".")[2], int(name.split(".")[1])) if name.startswith("h.") else (name, -1)
        rows.setdefault(part, {})[block] = level
    return rows


def _map(axes: Axes, rows: Mapping[str, Mapping[int, str]]) -> None:
    blocks = 1 + max((block for row in rows.values() for block in row), default=0)
    for y, (_, row) in enumerate(rows.items()):
        for block, level in row.items():
            x, wide = (0, blocks) if block < 0 else (block, 1)
            axes.broken_barh([(x, wide)], (y + 0.06, 0.88), facecolor=SHADE.get(level, PAPER), edgecolor=LIGHT, lw=0.6)
            said = level if block < 0 or blocks <= 16 else level.removeprefix("int").removeprefix("fp")
            ink = "white" if level in ("fp32", "fp16", "bf16") else INK
            size = 8 if block < 0 or blocks <= 12 else 6
            axes.text(x + wide / 2, y + 0.5, said, ha="center", va="center", size=size, color=ink)
    axes.set_xlim(0, blocks)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    axes.set_xticks(np.arange(blocks) + 0.5, [str(block) for block in range(blocks)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    axes.set_title("The fittest champion: precision of each component")
