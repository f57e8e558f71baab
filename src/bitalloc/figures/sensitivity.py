"""Maps of the model: what an error costs, how large the errors are, and what a plan gives to each matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bitalloc.figures.style import GREY, INK, OPTION, headline, option_name, option_names, page

FEW_BLOCKS = 16  # up to here cells hold their number
BITS = {2: "#ffffff", 3: "#dcdcdc", 4: "#b4b4b4", 8: "#8c8c8c", 16: "#646464"}  # darker = more bits


def sensitivity(frame: pd.DataFrame, path: Path, stamp: str) -> None:
    """SENSITIVITY -> PNG: the coefficient of every matrix with its interval, one panel a role, blocks along it."""
    first = frame["signal"].iloc[0]
    main = frame[(frame["signal"] == first) & (frame["coefficient"] > 0)]
    roles = list(dict.fromkeys(frame["role"]))
    top_row = main.loc[main["coefficient"].idxmax()]
    spread = main["coefficient"].max() / main["coefficient"].min()
    sentence = (
        f"What an error costs differs {spread:.0f}-fold between matrices; dearest is {top_row['role']} of block "
        f"{top_row['block']}"
    )
    others = [signal for signal in dict.fromkeys(frame["signal"]) if signal != first]
    hollow = f"; open: {', '.join(others)}" if others else ""
    footer = f"Filled: signal {first}, with 95 % intervals over windows{hollow}. {stamp}"
    height = 3.9
    with page(13.5, height, path) as figure:
        bottom, top = headline(figure, sentence, footer)
        grid = figure.add_gridspec(
            1, len(roles), left=0.07, right=0.99, bottom=bottom + 0.5 / height, top=top - 0.4 / height, wspace=0.08
        )
        shared = None
        for column, role in enumerate(roles):
            axes = figure.add_subplot(grid[column], sharey=shared)
            shared = shared or axes
            for signal, part in frame[frame["role"] == role].groupby("signal", sort=False):
                _coefficients(axes, part.sort_values("block"), filled=signal == first)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlim(-0.6, frame["block"].max() + 0.6)
            axes.set_title(role)
            axes.tick_params(labelleft=column == 0)
            axes.grid(axis="y", color="#ececec", lw=0.7)
            if column == 0:
                axes.set_ylabel("coefficient, nats a token\nfor each unit of relative error")
            if column == len(roles) // 2:
                axes.set_xlabel("block")


def _coefficients(axes: Axes, part: pd.DataFrame, *, filled: bool) -> None:
    """The interval is of the measured KL; the coefficient is KL / rel_error, so it scales along."""
    scale = part["coefficient"] / part["kl_nats_per_token"]
    axes.vlines(part["block"], part["lo"].astype(float) * scale, part["hi"].astype(float) * scale, color=INK, lw=1)
    axes.plot(
        part["block"], part["coefficient"], "o-" if filled else "o", color=INK if filled else GREY, lw=0.5,
        ms=4.5, mfc=INK if filled else "white", zorder=2 + filled,
    )  # fmt: skip


def errors(sweep: pd.DataFrame, path: Path, stamp: str) -> None:
    """SWEEP -> PNG: heat maps of rel_error by option and block, geometric mean over the matrices of a kind."""
    measured = sweep[sweep["rel_error"] > 0]
    logs = measured.assign(log=np.log(measured["rel_error"]))
    maps = {
        str(kind): np.exp(part.pivot_table(index=OPTION, columns="block", values="log"))
        for kind, part in logs.groupby("kind", sort=False)
    }
    ratio = measured.groupby("layer")["rel_error"].agg(lambda e: e.max() / e.min()).median()
    sentence = f"The options of one matrix differ {ratio:.0f}-fold in error (median matrix)"
    rows = max(len(table) for table in maps.values())
    height = 0.2 * rows + 2.1
    whole = pd.concat(maps.values()).to_numpy()
    norm = LogNorm(np.nanmin(whole), np.nanmax(whole))
    footer = f"{measured['layer'].nunique()} matrices; b = bits, g = group size, r = rank. {stamp}"
    with page(13.5, height, path) as figure:
        bottom, top = headline(figure, sentence, footer)
        grid = figure.add_gridspec(
            1, len(maps) + 1, left=0.08, right=0.94, bottom=bottom + 0.5 / height, top=top - 0.35 / height,
            wspace=0.2, width_ratios=[1] * len(maps) + [0.03],
        )  # fmt: skip
        for column, (kind, table) in enumerate(maps.items()):
            axes = figure.add_subplot(grid[column])
            image = axes.imshow(table, norm=norm, cmap="Greys", aspect="auto")
            axes.set_yticks(range(len(table)), option_names(table.index), size=7)
            axes.set_title(f"{kind}: relative output error")
            axes.set_xlabel("block")
            if len(table.columns) <= FEW_BLOCKS:
                axes.set_xticks(range(len(table.columns)), table.columns)
                _numbers(axes, table, norm)
        bar = figure.colorbar(image, cax=figure.add_subplot(grid[len(maps)]))
        bar.outline.set_visible(False)
        bar.set_label("tr(E H E\u1d40) / tr(W H W\u1d40)")


def _numbers(axes: Axes, table: pd.DataFrame, norm: LogNorm) -> None:
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        if np.isfinite(value):
            colour = "white" if norm(value) > 0.55 else INK
            axes.text(column, row, f"{value:.2g}", size=6.5, ha="center", va="center", color=colour)


def plan(frame: pd.DataFrame, name: str, path: Path, stamp: str) -> None:
    """PLAN -> PNG: the option of every matrix, blocks down, roles across; darker = more bits."""
    roles, blocks = list(dict.fromkeys(frame["role"])), sorted(frame["block"].unique())
    bits = np.average(frame["bits"])
    sentence = f"{name}: mean code {bits:.2f} bits, rank in {(frame['rank'] > 0).sum()} of {len(frame)} matrices"
    footer = f"Each cell: bits of a code, g = group size, r = rank; darker = more bits. {stamp}"
    height = 0.27 * len(blocks) + 1.6
    with page(9, height, path) as figure:
        bottom, top = headline(figure, sentence, footer)
        axes = figure.add_axes((0.07, bottom + 0.1 / height, 0.92, top - bottom - 0.5 / height))
        axes.set_xlim(-0.5, len(roles) - 0.5)
        axes.set_ylim(len(blocks) - 0.5, -0.5)
        for row in frame.itertuples():
            x, y = roles.index(row.role), blocks.index(row.block)
            colour = BITS.get(row.bits, BITS[16])
            cell = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="#bbbbbb", lw=0.6)
            axes.add_patch(cell)
            text = "16 bits" if row.bits >= 16 else option_name(row.bits, row.group_size, row.rank)
            axes.text(x, y, text, ha="center", va="center", size=7.5, color="white" if row.bits >= 8 else INK)
        axes.set_xticks(range(len(roles)), roles)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(blocks)), blocks)
        axes.set_ylabel("block")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
