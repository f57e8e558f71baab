"""What a run by hand measured: perplexity of every variant, and passkeys against length."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bitalloc.figures.style import GREY, INK, LIGHT, headline, label_ends, page, software

LOOKS = (
    ("o", "-", INK),
    ("s", (0, (4, 2)), "#0072b2"),
    ("^", (0, (1, 1)), "#d55e00"),
    ("D", (0, (6, 1, 1, 1)), "#009e73"),
)
WIDTH = 9.0  # inches


def perplexity(frame: pd.DataFrame, path: Path, *, model: str) -> None:
    """RECORDS of perplexity -> PNG: a panel for each corpus, a row for each variant."""
    rows = frame[frame["metric"] == "ppl"]
    names, tasks = list(dict.fromkeys(rows["variant"])), list(dict.fromkeys(rows["task"]))
    first = rows.iloc[0]
    window = f"windows of {int(first['prompt_length'])} tokens, the last {int(first['stride'])} scored"
    height = 1.8 + 0.32 * len(names)
    with page(WIDTH, height, path) as figure:
        bottom, top = headline(figure, f"Perplexity of {model} by precision", _footer(frame, window), size=11)
        grid = figure.add_gridspec(1, len(tasks), left=0.22, right=0.97, bottom=bottom + 0.45 / height,
                                   top=top - 0.25 / height, wspace=0.12)  # fmt: skip
        for column, task in enumerate(tasks):
            axes = figure.add_subplot(grid[column])
            of = rows[rows["task"] == task].set_index("variant")
            for y, name in enumerate(names):
                row = of.loc[name]
                if pd.isna(row["value"]):
                    axes.text(0.02, y, row["status"], transform=axes.get_yaxis_transform(), size=6.5, color=GREY,
                              va="center")  # fmt: skip
                    continue
                axes.plot([row["lo"], row["hi"]], [y, y], color=INK, lw=1.1)
                axes.plot(row["value"], y, "o", color=INK, mfc="white" if row["simulated"] else INK, ms=4.5)
            axes.set_title(task)
            axes.set_xlabel("perplexity")
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            axes.grid(axis="x", color="#ececec", lw=0.7)


def long_context(frame: pd.DataFrame, path: Path, *, model: str) -> None:
    """RECORDS of passkeys -> PNG: accuracy over all depths against length, a line for each variant."""
    rows = frame[(frame["metric"] == "accuracy") & frame["depth"].isna()]
    height = 4.2
    with page(WIDTH, height, path) as figure:
        count = int(rows["n"].iloc[0])
        items = f"the same {count} items of a length for every variant; grey: the reference is at its floor, no claim"
        sentence = f"Passkeys that {model} finds, by length and precision"
        bottom, top = headline(figure, sentence, _footer(frame, items), size=11)
        axes = figure.add_axes((0.08, bottom + 0.5 / height, 0.72, top - bottom - 0.6 / height))
        lengths, ends = sorted(rows["prompt_length"].astype(float).unique()), {}
        names = list(dict.fromkeys(rows["variant"]))
        for place, (name, (marker, dashes, colour)) in enumerate(zip(names, LOOKS * len(names), strict=False)):
            of = rows[rows["variant"] == name].sort_values("prompt_length")
            x, y, lo, hi = (of[column].astype(float).to_numpy() for column in ("prompt_length", "value", "lo", "hi"))
            x = x * 1.012 ** (place - (len(names) - 1) / 2)  # side by side, where they are equal
            shades = [LIGHT if status == "floor" else colour for status in of["status"]]
            axes.plot(x, y, ls=dashes, color=colour, lw=1.1, zorder=2)
            axes.vlines(x, lo, hi, color=shades, lw=1.1, zorder=2)
            axes.scatter(x, y, marker=marker, color=shades, s=22, zorder=3)
            ends[name] = (float(x[-1]), float(y[-1]))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("share of items answered right")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(axis="y", color="#ececec", lw=0.7)
        label_ends(axes, ends, points=7.5)


def _footer(frame: pd.DataFrame, protocol: str) -> str:
    first = frame.iloc[0]
    simulated = list(dict.fromkeys(frame.loc[frame["simulated"].astype(bool), "variant"]))
    note = f"; open: rounded, computed in full ({', '.join(simulated)})" if simulated else ""
    stands = f"{software(first['versions'])}, commit {first['git_commit']}"
    return f"{protocol}; 95 % intervals{note}. Run {first['run_id']}; {stands}."
