"""One evaluation for every tool: dequantised weights in a plain `transformers` model, on text nobody calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from bitalloc.models import load_model, pick_device
from bitalloc.statistics.intervals import quantile
from bitalloc.suites import Head, Windows
from bitalloc.suites.intervals import mean

RESAMPLES = 2000


class Evaluation:
    """The model and its own answers on the windows of the report split."""

    def __init__(self, path: Path, tokens: pd.DataFrame, *, layers: Sequence[str], device: str = "auto") -> None:
        where = pick_device(device)
        self.layers, self.model = list(layers), load_model(path, device=where)
        self.windows = Windows(tokens[tokens["split"] == "report"], batch=8, device=where)
        self.head = Head(self.model)
        self.reference = [h_ND.cpu() for h_ND in self.windows.hidden(self.model)]

    def scores(self, weights: Path | None = None) -> pd.DataFrame:
        """nll and kl (reference || model) in nats a token and top1, means over each window; `corpus`.

        `weights`: safetensors of every linear layer as its module has it; None: the model as it is.
        """
        if weights:
            with safe_open(weights, "pt") as file, torch.no_grad():
                for layer in self.layers:
                    self.model.get_submodule(layer).weight.copy_(file.get_tensor(layer))
        scores = self.windows.scores(self.head, self.windows.hidden(self.model), self.reference)
        if not np.isfinite(scores["nll"]).all():
            raise FloatingPointError("scores are NaN or Inf")
        return scores.assign(corpus=self.windows.frame["corpus"].to_numpy())


def summary(scores: pd.DataFrame) -> dict[str, Any]:
    """Means over windows, with 95 % intervals (bootstrap over windows within each corpus), and by corpus."""
    kl = mean(scores["kl"], scores["tokens"], scores["corpus"], resamples=RESAMPLES, seed=0)
    by_corpus = {str(name): _means(part) for name, part in scores.groupby("corpus", sort=False)}
    return {**_means(scores), "kl_lo": kl.lo, "kl_hi": kl.hi, "corpora": by_corpus}


def _means(scores: pd.DataFrame) -> dict[str, float]:
    weights = scores["tokens"]
    found = {name: float(np.average(scores[name], weights=weights)) for name in ("nll", "kl", "top1")}
    return {"nll": found["nll"], "ppl": float(np.exp(found["nll"])), "kl": found["kl"], "top1": found["top1"]}


def ratio(ours: pd.DataFrame, peer: pd.DataFrame) -> tuple[float, float, float]:
    """KL of ours over that of a peer on the same windows, and its 95 % interval (paired bootstrap over windows).

    >>> frame = pd.DataFrame({"kl": [1.0, 2.0, 3.0], "tokens": 1.0, "corpus": "a"})
    >>> ratio(frame.assign(kl=frame["kl"] / 2), frame)
    (0.5, 0.5, 0.5)
    """
    parts = [weight_RN @ np.stack([frame["kl"][rows] for frame in (ours, peer)], 1) for weight_RN, rows in _drawn(ours)]
    ours_R, peer_R = np.sum(parts, axis=0).T
    value = np.average(ours["kl"], weights=ours["tokens"]) / np.average(peer["kl"], weights=peer["tokens"])
    return float(value), *_ends(ours_R / peer_R)


def perplexity_ratio(ours: pd.DataFrame, peer: pd.DataFrame) -> tuple[float, float, float]:
    """exp(mean NLL of ours - mean NLL of a peer) on the same windows: PPL over PPL, and its interval as in `ratio`.

    >>> frame = pd.DataFrame({"nll": [1.0, 2.0, 3.0], "tokens": 1.0, "corpus": "a"})
    >>> [round(each, 3) for each in perplexity_ratio(frame.assign(nll=frame["nll"] - np.log(2)), frame)]
    [0.5, 0.5, 0.5]
    """
    change_N = ours["nll"] - peer["nll"]
    parts = [np.stack([weight_RN @ change_N[rows], weight_RN.sum(1)], 1) for weight_RN, rows in _drawn(ours)]
    change_R, tokens_R = np.sum(parts, axis=0).T
    value = np.exp(np.average(change_N, weights=ours["tokens"]))
    return float(value), *_ends(np.exp(change_R / tokens_R))


def _drawn(scores: pd.DataFrame) -> Iterator[tuple[np.ndarray, pd.Index]]:
    """Of each corpus the tokens by which its windows count in every resample [RESAMPLES, windows], and its rows."""
    draw = np.random.default_rng(0)
    for _, rows in scores.groupby("corpus", sort=False):
        count_RN = draw.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
        yield count_RN * rows["tokens"].to_numpy(), rows.index


def _ends(value_R: np.ndarray) -> tuple[float, float]:
    lo, hi = np.quantile(value_R, [0.025, 0.975])
    return float(lo), float(hi)


def over_seeds(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios of several calibrations, and exp of Student's interval of their logarithms.

    >>> [round(each, 3) for each in over_seeds([0.5, 0.5, 0.5])]
    [0.5, 0.5, 0.5]
    """
    logs = np.log(ratios)
    half = quantile(len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else np.nan
    return tuple(float(np.exp(logs.mean() + end)) for end in (0, -half, half))  # type: ignore[return-value]


def over_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of a tool at a budget over calibrations: means, of KL with Student's interval (t, 95 %).

    >>> rows = [{"bpw": 2.5, "seconds": 9.0, "kl": kl, "kl_lo": 0.0, "kl_hi": 9.0} for kl in (1.0, 3.0)]
    >>> [round(float(over_rows(rows)[name]), 1) for name in ("kl", "kl_lo", "kl_hi")], over_rows(rows[:1])["kl_hi"]
    ([2.0, -10.7, 14.7], 9.0)
    """
    if len(rows) == 1:
        return dict(rows[0])
    kl = np.array([row["kl"] for row in rows])
    half = quantile(len(kl) - 1) * kl.std(ddof=1) / np.sqrt(len(kl))
    # CPU seconds of the first: later ones share the runs of their budgets
    return {
        **rows[0],
        "bpw": np.mean([row["bpw"] for row in rows]),
        "kl": kl.mean(),
        "kl_lo": kl.mean() - half,
        "kl_hi": kl.mean() + half,
    }


# ---- the figure --------------------------------------------------------------------------------------
MARKERS = {
    "bitalloc best": "o",
    "bitalloc tuned": "*",
    "bitalloc quality": "H",
    "bitalloc uniform": "<",
    "bitalloc map + autoround": "p",
}
MARKERS |= {"autoscheme": "s", "autoround": "^", "modelopt": "v", "gptqmodel": "D", "llmcompressor": "P", "hqq": "X"}
LINES = {
    "bitalloc best": "-",
    "bitalloc tuned": "-.",
    "bitalloc quality": "-",
    "bitalloc uniform": "--",
    "bitalloc map + autoround": ":",
}


def draw(rows: Sequence[Mapping[str, Any]], name: str, path: Path) -> None:
    """KL against bits a weight of every tool of one model, and against CPU seconds at the smallest budget."""
    from bitalloc.figures.style import GREY, INK, headline, page

    made = [row for row in rows if row["budget"] and row["kl"] is not None]
    # ours at the very bytes of a peer is for the pairs
    asked = {row["budget"] for row in made if not row["tool"].startswith("bitalloc")}
    shown = [row for row in made if row["budget"] in asked] or made
    if not shown:
        return
    places = dict.fromkeys((row["tool"], row["budget"]) for row in shown)
    shown = [over_rows([row for row in shown if (row["tool"], row["budget"]) == place]) for place in places]
    least = min(row["budget"] for row in shown)
    sentence = f"{name}: how far every tool departs from the model, by the bits it stores and by what it costs"
    footer = (
        "Black: bitalloc. Bars: 95 % intervals, over calibrations where there are several, else over windows. "
        "KL from the unquantised model, text nobody calibrated on. "
        "CPU seconds of all processes from model to packed checkpoint, imports included."
    )
    with page(11, 5.4, path) as figure:
        bottom, top = headline(figure, sentence, footer)
        left = figure.add_axes((0.07, bottom + 0.1, 0.33, top - bottom - 0.15))
        right = figure.add_axes((0.46, bottom + 0.1, 0.33, top - bottom - 0.15), sharey=left)
        for tool in dict.fromkeys(row["tool"] for row in shown):
            own = sorted((row for row in shown if row["tool"] == tool), key=lambda row: row["bpw"])
            colour = INK if tool.startswith("bitalloc") else GREY
            look = {
                "marker": MARKERS.get(tool, "o"),
                "color": colour,
                "ms": 7 if tool == "bitalloc tuned" else 4.5,
                "lw": 1,
                "elinewidth": 0.7,
            }
            look |= {"mfc": colour if tool == "bitalloc best" else "white"}
            for axes, part, column, line in (
                (left, own, "bpw", LINES.get(tool, ":")),
                (right, [row for row in own if row["budget"] == least], "seconds", ""),
            ):
                kl = np.array([row["kl"] for row in part])
                bars = np.abs(np.array([(row["kl_lo"], row["kl_hi"]) for row in part]).reshape(-1, 2).T - kl)
                axes.errorbar([row[column] for row in part], kl, bars, ls=line, label=tool, **look)
        left.set(xlabel="bits a weight, as stored", ylabel="KL, nats a token", yscale="log", title="all budgets")
        right.set(xlabel="CPU seconds", xscale="log", title=f"asked for {least:g} bits a weight")
        for axis in (left.yaxis, right.xaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
        figure.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.8, 0.55), frameon=False)
