"""Speed and memory: tokens a second of prefill and decode, and peak memory, against the length of the prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bitalloc.figures.style import GREY, INK, headline, label_ends, page, software

LOOKS = (
    ("o", "-", INK), ("s", (0, (4, 2)), "#0072b2"), ("^", (0, (1, 1)), "#d55e00"), ("D", (0, (6, 1, 1, 1)), "#009e73"),
    ("v", "-", "#cc79a7"), ("P", (0, (2, 2)), "#56b4e9"), ("X", (0, (1, 2)), GREY),
)  # fmt: skip
RATES = {"prefill_tokens_per_s": "Prefill, tokens/s", "decode_tokens_per_s": "Decode, tokens/s"}
PEAK, LIBRARIES = "peak", "libraries_mem_mb"
WIDTH, ROW = 13.5, 2.6  # inches


def profile(frame: pd.DataFrame, path: Path, *, model: str) -> None:
    """RECORDS of a profile -> PNG: a row of panels for each batch, a line for each variant."""
    names = list(dict.fromkeys(frame["variant"]))
    simulated = [name for name in names if frame.loc[frame["variant"] == name, "simulated"].any()]
    shown = [name for name in names if name not in simulated]
    batches = sorted(int(batch) for batch in frame["batch"].dropna().unique())
    look = dict(zip(names, LOOKS * len(names), strict=False))
    height = ROW * len(batches) + 1.6
    with page(WIDTH, height, path) as figure:
        bottom, top = headline(figure, message(frame), _footer(frame, model, simulated))
        grid = figure.add_gridspec(
            len(batches), 3, left=0.055, right=0.86, bottom=bottom + 0.5 / height, top=top - 0.3 / height,
            wspace=0.22, hspace=0.45,
        )  # fmt: skip
        for row, batch in enumerate(batches):
            part = frame[frame["batch"] == batch]
            drawn = [(rate, RATES[rate]) for rate in RATES] + [(PEAK, _memory_title(frame))]
            for column, (metric, title) in enumerate(drawn):
                axes = figure.add_subplot(grid[row, column])
                ends = {}
                for name in shown:
                    points = _peaks(frame, part, name) if metric == PEAK else _rates(part, name, metric)
                    if len(points):
                        _line(axes, points, look[name])
                        ends[name] = (float(points["length"].iloc[-1]), float(points["value"].iloc[-1]))
                _axes(axes, sorted(part["prompt_length"].dropna().unique()), log=metric != PEAK)
                _gone(axes, part, shown)
                axes.set_title(f"{title}, batch {batch}", size=8.5)
                if row == len(batches) - 1:
                    axes.set_xlabel("tokens of the prompt")
                if column == 2 and ends:
                    label_ends(axes, {_label(frame, name): end for name, end in ends.items()}, points=7.5)


def message(frame: pd.DataFrame) -> str:
    """What the page says: how fast each variant writes beside the first, where it was asked the most.

    >>> columns = ["variant", "metric", "batch", "prompt_length", "value", "lo", "hi", "simulated"]
    >>> rows = [("int8", "decode_speedup", 4, 512, 0.75, 0.7, 0.8, False)]
    >>> message(pd.DataFrame(rows, columns=columns))
    'Decode after 512 tokens at batch 4, beside the first: int8 0.75x [0.7, 0.8]'
    """
    speed = frame[(frame["metric"] == "decode_speedup") & frame["value"].notna() & ~frame["simulated"].astype(bool)]
    if speed.empty:
        return "Tokens a second and peak memory against the length of the prompt"
    batch, length = max(zip(speed["batch"], speed["prompt_length"], strict=True))
    last = speed[(speed["batch"] == batch) & (speed["prompt_length"] == length)]
    told = [f"{row.variant} {row.value:.2g}x [{row.lo:.2g}, {row.hi:.2g}]" for row in last.itertuples()]
    named = frame["variant"].iloc[0]
    first = "the first" if named in set(last["variant"]) else named
    return f"Decode after {int(length)} tokens at batch {int(batch)}, beside {first}: {', '.join(told)}"


def _rates(part: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    rows = part[(part["variant"] == name) & (part["metric"] == metric) & part["value"].notna()]
    found = rows[["value", "lo", "hi"]].astype(float)
    return found.assign(length=rows["prompt_length"].astype(float)).sort_values("length")


def _peaks(frame: pd.DataFrame, part: pd.DataFrame, name: str) -> pd.DataFrame:
    """The larger of the peaks of prefill and decode, above what Python and its libraries take."""
    own = frame[(frame["variant"] == name) & (frame["metric"] == LIBRARIES)]["value"].dropna()
    rows = part[(part["variant"] == name) & part["metric"].isin(["prefill_mem_mb", "decode_mem_mb"])]
    rows = rows[rows["value"].notna()].astype({"value": float, "prompt_length": float})
    most = rows.groupby("prompt_length")["value"].max() - (float(own.iloc[0]) if len(own) else 0.0)
    return pd.DataFrame({"length": most.index, "value": most.to_numpy()})


def _line(axes: Axes, points: pd.DataFrame, look: tuple) -> None:
    marker, dashes, colour = look
    axes.plot(points["length"], points["value"], marker=marker, ls=dashes, color=colour, ms=4.5, lw=1.2, zorder=3)
    if "lo" in points:
        axes.vlines(points["length"], points["lo"], points["hi"], color=colour, lw=1.1, zorder=2)


def _axes(axes: Axes, lengths: list[float], *, log: bool) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if log and axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_minor))
        axes.tick_params(axis="y", which="minor", labelsize=7)
    elif axes.lines:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)


def _minor(y: float, _: int) -> str:
    """Minor ticks bear 2, 3, 5 and 7 alone."""
    return f"{y:,.0f}" if y and round(y / 10 ** np.floor(np.log10(y))) in (2, 3, 5, 7) else ""


def _gone(axes: Axes, part: pd.DataFrame, names: list[str]) -> None:
    """A cross above where a variant had not the memory."""
    lost = part[part["variant"].isin(names) & part["status"].str.contains("out of memory")]
    for length, rows in lost.groupby("prompt_length"):
        said = f"no memory: {', '.join(dict.fromkeys(rows['variant']))}"
        axes.annotate(said, (float(length), 0.98), xycoords=("data", "axes fraction"), size=6.5, color=GREY,
                      ha="center", va="top", rotation=90)  # fmt: skip


def _label(frame: pd.DataFrame, name: str) -> str:
    dtype = frame.loc[frame["variant"] == name, "dtype"].dropna()
    return f"{name} ({dtype.iloc[0]})" if len(dtype) else name


def _memory_title(frame: pd.DataFrame) -> str:
    above = frame.loc[frame["metric"] == LIBRARIES, "value"].notna().any()
    return "Peak memory above the libraries', MB" if above else "Peak memory, MB"


def _footer(frame: pd.DataFrame, model: str, simulated: list[str]) -> str:
    first = frame.iloc[0]
    threads = frame["threads"].dropna()
    where = first["gpu"] if isinstance(first["gpu"], str) else "a CPU"
    if where == "a CPU" and len(threads):
        count = int(threads.iloc[0])
        where = f"a CPU ({count} thread{'s' * (count > 1)}, {frame['isa'].dropna().iloc[0]})"
    new = frame["gen_len"].dropna()
    parts = [
        f"{model} on {where}: medians over generations of {int(new.iloc[0])} tokens, interleaved, 95 % bootstrap "
        "intervals of the median; memory: high-water mark of a process that does nothing else, once"
    ]
    if simulated:
        parts.append(f"Left out, rounded but computed in full: {', '.join(simulated)}")
    refused = frame[frame["metric"] == "load_s"]
    for row in refused[refused["value"].isna()].itertuples():
        parts.append(f"{row.variant}: {row.status}")
    return ". ".join(parts) + f". {software(first['versions'])}, commit {first['git_commit']}."
