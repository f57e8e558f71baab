"""How a state space fails as its projections get fewer bits: predictions, long contexts, the state, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bitalloc.figures.style import GREY, INK, headline, label_ends, page
from bitalloc.scheme import LADDER

REFERENCE = "reference"
ALL_DEPTHS = WHOLE = -1
LINES = {REFERENCE: ("o", "-"), "bf16": ("s", "--"), "w8a8": ("^", "-"), "w4a8": ("D", "-"), "w4a4": ("v", "-")}
SHADES = {REFERENCE: INK, "bf16": "#999999", "w8a8": "#0072b2", "w4a8": "#d55e00", "w4a4": "#cc79a7"}
CORPORA = ("o", "^", "s", "D")
BLOCKS = "o^sDvPX*"
PARTS = ("in_proj", "z", "x", "B", "C", "dt", "out_proj")


def failure_modes(
    tables: dict[str, pd.DataFrame], path: Path, stamp: str = "", *, model: str, scheme: str = "w4a4"
) -> None:
    """SCHEMES, PASSKEY, DRIFT and LAYERWISE, under these names in small letters -> PNG of four panels."""
    drift = tables["drift"]
    length = int(drift["t"].max())
    footer = (
        f"{model}. a: lines 95 % bootstrap over report windows; beside each the perplexity. b: "
        f"{_items(tables['passkey'])} items a length, the same for every scheme, Wilson's 95 % intervals; hollow where "
        "the reference is not above chance: no claim. c: means over layers and heads, teacher-forced on identical "
        f"tokens, to {length:,}; bands 95 % over sequences; slopes in log-log. What strays is the state that quantised "
        f"projections write: the state itself stays in float32. d: one module in {scheme} and all else as it is, 95 % "
        f"bootstrap over select windows. {stamp}"
    )
    with page(13.5, 8.2, path) as figure:
        bottom, top = headline(figure, sentence(tables, scheme), footer)
        bottom, top = bottom + 0.06, top - 0.04
        grid = figure.add_gridspec(2, 2, left=0.095, right=0.92, bottom=bottom, top=top, wspace=0.62, hspace=0.42)
        _predictions(figure.add_subplot(grid[0, 0]), tables["schemes"])
        _keys(figure.add_subplot(grid[0, 1]), tables["passkey"])
        _state(figure.add_subplot(grid[1, 0]), drift)
        _modules(figure.add_subplot(grid[1, 1]), tables["layerwise"], scheme)


def sentence(tables: dict[str, pd.DataFrame], scheme: str) -> str:
    """What the page says: what the lowest scheme of the ladder does, and the one above it."""
    return "; ".join(_told(tables, name) for name in dict.fromkeys(["w8a8", scheme]))


def _told(tables: dict[str, pd.DataFrame], scheme: str) -> str:
    said = []
    rows = tables["schemes"].query("scheme == @scheme")
    if len(rows):
        said.append(f"KL {_span(rows['kl_nats_per_token'], '.1g')} nats a token")
    keys = tables["passkey"].query("scheme == @scheme and depth == @ALL_DEPTHS and status == 'ok'")
    if len(keys):
        said.append(f"keeps {_span(100 * keys['retention'], '.0f')} % of the keys")
    drift = tables["drift"].query("scheme == @scheme and layer == @WHOLE")
    state = drift[drift["metric"] == "state_relerr"]
    if len(state):
        last = state.loc[state["t"].idxmax()]
        said.append(f"state off by {_short(100 * last['value'])} % after {last['t']:,} tokens")
    return f"{scheme.upper()}: {', '.join(said)}" if said else f"{scheme.upper()}: not measured"


def _span(values: pd.Series, how: str) -> str:
    ends = dict.fromkeys(f"{end:{how}}" for end in (values.min(), values.max()))
    return " to ".join(ends)


def _short(value: float) -> str:
    """
    >>> _short(143.7), _short(0.0512)
    ('144', '0.051')
    """
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _items(passkey: pd.DataFrame) -> int:
    return int(passkey.loc[passkey["depth"] == ALL_DEPTHS, "n"].max())


def _shown(schemes: pd.DataFrame) -> list[str]:
    """The ladder as it is, and at each step with the techniques that leave the least KL."""
    measured = schemes[(schemes["status"] == "measured") & (schemes["quant_backend"] == "simulated")]
    kl = measured.groupby("scheme")["kl_nats_per_token"].mean()
    named = []
    for base in LADDER:
        own = kl[[name for name in kl.index if name.split("+")[0] == base]]
        if base in kl.index:
            named += dict.fromkeys([base, own.idxmin()])
    return named


def _predictions(axes: Axes, schemes: pd.DataFrame) -> None:
    names, tasks = _shown(schemes), list(dict.fromkeys(schemes["task"]))
    for y, name in enumerate(names):
        for place, row in enumerate(schemes[schemes["scheme"] == name].itertuples()):
            at = y + (place - (len(tasks) - 1) / 2) * 0.3
            axes.plot([max(row.kl_lo, 1e-9), row.kl_hi], [at, at], color=GREY, lw=1.2)
            axes.plot(row.kl_nats_per_token, at, CORPORA[place % 4], color=INK, mfc="white", ms=5)
            axes.annotate(
                f"{row.ppl:.2f}", (1.02, at), xycoords=("axes fraction", "data"), size=7.5, va="center", color=GREY
            )
    axes.annotate("PPL", (1.02, 1.02), xycoords="axes fraction", size=7.5, color=GREY)
    for place, task in enumerate(tasks):
        axes.plot([], [], CORPORA[place % 4], color=INK, mfc="white", ms=5, label=task.partition("/")[0])
    axes.legend(frameon=False, fontsize=7.5, loc="best")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), [_lines(name) for name in names], size=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("KL to the unquantised model, nats a token")
    axes.set_title("a  Predictions")


def _lines(scheme: str) -> str:
    """
    >>> _lines("w4a4+gptq+online+folded+dp").splitlines()
    ['w4a4', '+gptq+online', '+folded+dp']
    """
    base, *techniques = scheme.split("+")
    pairs = ["".join(f"+{name}" for name in techniques[k : k + 2]) for k in range(0, len(techniques), 2)]
    return "\n".join([base, *pairs])


def _keys(axes: Axes, passkey: pd.DataFrame) -> None:
    whole = passkey[passkey["depth"] == ALL_DEPTHS]
    names, ends = list(dict.fromkeys(whole["scheme"])), {}
    for place, name in enumerate(names):
        own = whole[whole["scheme"] == name].sort_values("length")
        marker, style = LINES.get(name, ("P", ":"))
        colour = SHADES.get(name, GREY)
        x = own["length"] * 1.04 ** (place - (len(names) - 1) / 2)  # beside each other, not over
        axes.vlines(x, 100 * own["accuracy_lo"], 100 * own["accuracy_hi"], color=colour, lw=1)
        axes.plot(x, 100 * own["accuracy"], style, color=colour, lw=1.3)
        for value, at, status in zip(own["accuracy"], x, own["status"], strict=True):
            axes.plot(at, 100 * value, marker, color=colour, ms=5, mfc="white" if status == "floor" else colour)
        ends[name] = (float(x.iloc[-1]), 100 * float(own["accuracy"].iloc[-1]))
    axes.axhline(100 * whole["chance"].iloc[0], color=GREY, lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    lengths = sorted(set(whole["length"]))
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens of the prompt (dotted: chance)")
    axes.set_ylabel("keys recalled, %")
    axes.set_title("b  Passkey")
    label_ends(axes, ends, points=7.5)


def _state(axes: Axes, drift: pd.DataFrame) -> None:
    rows = drift[(drift["metric"] == "state_relerr") & (drift["layer"] == WHOLE) & (drift["value"] > 0)]
    slopes = drift[(drift["metric"] == "slope") & (drift["layer"] == WHOLE)].set_index("scheme")
    ends = {}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, own in rows.groupby("scheme", sort=False):
        floor = name.startswith("floor")
        marker, style = ("", ":") if floor else LINES.get(name, ("P", "-"))
        colour = GREY if floor else SHADES.get(name, GREY)
        axes.fill_between(own["t"], own["lo"].clip(lower=own["value"] / 10), own["hi"], color=colour, alpha=0.2, lw=0)
        axes.plot(own["t"], own["value"], style, marker=marker or None, color=colour, ms=4.5, lw=1.4)
        slope = slopes.loc[name]
        told = (
            "" if not np.isfinite(slope["value"]) else f" ({slope['value']:.2f} [{slope['lo']:.2f}, {slope['hi']:.2f}])"
        )
        ends[name.removeprefix("floor: ") + told] = (float(own["t"].iloc[-1]), float(own["value"].iloc[-1]))
    times = sorted(set(rows["t"]))
    axes.set_xticks(times, [f"{t:,}" for t in times])
    axes.set_xlabel("tokens read (dotted: floors, the model read otherwise)")
    axes.set_ylabel("relative error of the state")
    axes.set_title("c  State")
    label_ends(axes, ends, points=7.5)


def _modules(axes: Axes, layerwise: pd.DataFrame, scheme: str) -> None:
    rows = layerwise[(layerwise["scheme"] == scheme) & (layerwise["mode"] == "quantise")]
    whole = layerwise[(layerwise["scheme"] == scheme) & (layerwise["mode"] == "all")]
    name = rows["part"].where(rows["part"] != "all", rows["role"])
    parts = [part for part in PARTS if part in set(name)] or list(dict.fromkeys(name))
    blocks = sorted(set(rows["block"]))
    for y, part in enumerate(parts):
        for row in rows[name == part].itertuples():
            place = blocks.index(row.block)
            at = y + (place - (len(blocks) - 1) / 2) * 0.7 / max(1, len(blocks))
            axes.plot([max(row.kl_lo, 1e-9), row.kl_hi], [at, at], color=GREY, lw=1)
            axes.plot(row.kl_nats_per_token, at, BLOCKS[place % len(BLOCKS)], color=INK, mfc="white", ms=4.5)
    for place, block in enumerate(blocks[: len(BLOCKS)]):
        axes.plot([], [], BLOCKS[place], color=INK, mfc="white", ms=4.5, ls="", label=f"block {block}")
    if len(whole):
        axes.axvline(whole["kl_nats_per_token"].iloc[0], color=GREY, lw=1, ls="--", label="all at once")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xscale("log")
    axes.set_yticks(range(len(parts)), [part if "proj" in part else f"{part} (in_proj)" for part in parts])
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlabel(f"KL with this alone in {scheme}, nats a token")
    axes.set_title("d  Where it hurts")
