"""Tables of the chain as grids of a document: what a plan costs and scores, laws, verdicts, levels of success.

Every number here is a cell of a table, rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bitalloc.documents import Block, Bullets, Grid, Section
from bitalloc.errors import BitallocError
from bitalloc.statistics import accuracies
from bitalloc.tables import without_arms

REFERENCE, BEST, ALL = "reference", "best", "all"
POOL = "random"
HEADER = ("plan", "on disk", "bits a weight", "PPL", "KL")
LEVELS = ("minimal", "target", "stretch")


def human(nbytes: float) -> str:
    """Bytes as people read them, decimal units, three digits.

    >>> human(947_200), human(18_000_000_000), human(7)
    ('947 kB', '18.0 GB', '7 B')
    """
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if nbytes < 999.5 or unit == "TB":
            break
    return f"{nbytes:.{max(0, 2 - int(np.log10(nbytes)))}f} {unit}"


def named(plans: pd.DataFrame) -> pd.DataFrame:
    """The plans that are an answer: neither of the pool nor of an arm of the analysis."""
    return without_arms(plans[plans["strategy"] != POOL])


def first_corpus(evaluate: pd.DataFrame) -> str:
    """The corpus that PPL is told on; raises `BitallocError` where there is none."""
    corpora = evaluate.loc[(evaluate["metric"] == "ppl") & ~evaluate["task"].str.endswith("/select"), "task"]
    if corpora.empty:
        raise BitallocError("evaluate holds no ppl of the report split: add the suite perplexity to evaluate")
    return str(corpora.iloc[0])


def plan_rows(
    plans: pd.DataFrame, evaluate: pd.DataFrame, checkpoints: pd.DataFrame
) -> tuple[tuple[str, ...], list[tuple[str, ...] | None]]:
    """Header and rows of the named plans, the reference first; None stands between budgets."""
    right = accuracies(evaluate)
    scores = pd.concat([evaluate[evaluate["metric"] != "acc"], right]).set_index(["plan", "metric", "task"])
    corpus = first_corpus(evaluate)
    tasks = dict(zip(right["task"], right["status"], strict=True))
    on_disk = checkpoints.set_index("plan")["nbytes"]

    def cell(plan: str, metric: str, task: str, shape: str, scale: float = 1.0) -> str:
        if (plan, metric, task) not in scores.index:
            return "-"
        row = scores.loc[(plan, metric, task)]
        return shape.format(*(scale * row[name] for name in ("value", "lo", "hi")))

    def row(plan: str, size: str, bits: str) -> tuple[str, ...]:
        ppl = cell(plan, "ppl", corpus, "{:.3f} [{:.3f}, {:.3f}]")
        kl = cell(plan, "kl_nats_per_token", corpus, "{:.4f}")
        return (plan, size, bits, ppl, kl, *(cell(plan, "acc", task, "{:.1f}", 100.0) for task in tasks))

    found: list[tuple[str, ...] | None] = [row(REFERENCE, "-", "16")]
    answers = named(plans)
    order = answers.groupby("budget", sort=False)["bits_per_weight"].mean().sort_values().index
    for budget in order:
        found.append(None)
        for plan in answers[answers["budget"] == budget].itertuples():
            size = human(on_disk[plan.plan]) if plan.plan in on_disk.index else f"({human(plan.checkpoint_nbytes)})"
            found.append(row(plan.plan, size, f"{plan.bits_per_weight:.3f}"))
    return (*HEADER, *(f"{task} (floor)" if at == "floor" else task for task, at in tasks.items())), found


def plans_note(evaluate: pd.DataFrame) -> str:
    return (
        f"PPL and KL (nats a token) on {first_corpus(evaluate)}, 95 % intervals; tasks in % right; sizes in brackets "
        "are predicted: no checkpoint was written."
    )


def plans_grid(plans: pd.DataFrame, evaluate: pd.DataFrame, checkpoints: pd.DataFrame, stands_on: str = "") -> Grid:
    header, rows = plan_rows(plans, evaluate, checkpoints)
    return Grid(header, rows, plans_note(evaluate), stands_on)


# ---- what was reached
SUCCESS_NOTE = "Reached: by the value. Certainly: by the unfavourable end of the 95 % interval too."
CRITERIA = {
    "ppl_gain_percent": "PPL gain of best over uniform",
    "accuracy_drop_points": "accuracy that best loses, worst task",
    "r2_log": "R\u00b2 of log error, in sample",
    "r2_loo": "R\u00b2 of log error, each option left out",
}


def success_grid(success: pd.DataFrame) -> Grid:
    """SUCCESS as it heads the pages, with the verdicts that its rows stand on."""
    header = ("criterion", "budget", "on", "measured", "reached", "certainly", *LEVELS, "n")
    rows = []
    for row in success.to_dict("records"):
        unit = "" if row["unit"] == "1" else f" {row['unit']}"
        sign = {">=": "\u2265", "<=": "\u2264"}[row["comparison"]]
        place = ("" if row[name] == ALL else row[name] for name in ("budget", "gold"))
        measured = estimate(row, 1 if unit else 3, unit) if row["status"] == "ok" else row["status"]
        bounds = [f"{sign} {row[level]:g}{unit}" for level in LEVELS]
        rows.append(
            (CRITERIA[row["criterion"]], *place, measured, row["level"], row["level_sure"], *bounds, str(row["n"]))
        )
    return Grid(header, rows, SUCCESS_NOTE, "; ".join(dict.fromkeys(success["verdicts"])))


# ---- rank versus bits
CONTROLS_NOTE = (
    "The plan that may use rank and bits (joint) against those that may use one of them, at equal bytes, paired window "
    "by window; below 0 the joint plan is better."
)


def controls_grid(controls: pd.DataFrame, stands_on: str = "") -> Grid:
    """CONTROLS, its divergence alone, and why there was nothing to compare."""
    header = ("budget", "control", "corpus", "KL of joint", "of the control", "joint - control, 1e-3 nats a token", "n")
    rows = []
    for row in controls[controls["metric"].isin(["kl_nats_per_token", ""])].to_dict("records"):
        told = [f"{row[name]:.4f}" if np.isfinite(row[name]) else "-" for name in ("joint", "alone")]
        scaled = {end: 1000 * row[end] for end in ("value", "lo", "hi")}
        found = estimate(scaled, 2) if row["status"] == "ok" else row["status"]
        corpus = row["task"].removesuffix("/report")
        rows.append((row["budget"], row["control"], corpus or "-", *told, found, str(row["n"])))
    return Grid(header, rows, CONTROLS_NOTE, stands_on)


def estimate(row: Any, digits: int, unit: str = "") -> str:
    """A point estimate with its interval, if it has one.

    >>> estimate({"value": 1.26, "lo": -0.04, "hi": 2.5}, 1, " %"), estimate({"value": float("nan")}, 1)
    ('1.3 [0.0, 2.5] %', 'not measured')
    """
    value, lo, hi = (float(row.get(end, np.nan)) for end in ("value", "lo", "hi"))
    if not np.isfinite(value):
        return "not measured"
    shown = [f"{round(each, digits) + 0.0:.{digits}f}" for each in (value, lo, hi)]
    return shown[0] + (f" [{shown[1]}, {shown[2]}]" if np.isfinite([lo, hi]).all() else "") + unit


# ---- the law
GOODNESS = {
    "of log error": "r2_log",
    "each option left out": "r2_loo",
    "of the effect of rank": "r2_rank",
}
LAW_NOTE = (
    "R\u00b2 over all matrices: of log error in sample, of options left out in turn, and of the effect of rank at "
    "equal bits, log E(b, r) - log E(b, 0). A mean predicts as well as 0 says; below 0 the law is worse than that."
)


def law_grid(law: pd.DataFrame, stands_on: str = "") -> Grid:
    pooled = law[law["scope"] == "pooled"].set_index(["form", "statistic"])
    rows = []
    for form in dict.fromkeys(law.loc[law["scope"] == "pooled", "form"]):
        found = [pooled.loc[(form, name)] if (form, name) in pooled.index else {} for name in GOODNESS.values()]
        rows.append((form, *(estimate(each, 3) if len(each) else "-" for each in found)))
    return Grid(("law", *GOODNESS), rows, LAW_NOTE, stands_on)


# ---- what a budget buys
def gains_grid(goodhart: pd.DataFrame, stands_on: str = "") -> Grid:
    """Each strategy against uniform at equal bytes, on the first corpus; budgets as columns."""
    rows = goodhart[(goodhart["analysis"] == "gain") & (goodhart["statistic"] == "ppl_gain_percent")]
    corpus = str(rows["gold"].iloc[0]) if len(rows) else ""
    rows = rows[rows["gold"] == corpus]
    budgets = list(dict.fromkeys(rows["budget"]))
    cells = rows.set_index(["proxy", "budget"])
    found = [
        (
            strategy,
            *(estimate(cells.loc[(strategy, b)], 1) if (strategy, b) in cells.index else "-" for b in budgets),
        )
        for strategy in dict.fromkeys(rows["proxy"])
    ]
    caption = (
        f"PPL below uniform's at equal bytes, %, on {corpus.removeprefix('ppl:')}; intervals pair windows. Negative is "
        "worse than uniform."
    )
    return Grid(("strategy", *budgets), found, caption, stands_on)


GOODHART_HEADER = ("proxy", "gold", "budget", "statistic", "value", "n", "p", "status")


def goodhart_grids(goodhart: pd.DataFrame, stands_on: str = "", *, whole: bool = True) -> list[tuple[str, Grid]]:
    """(analysis, its rows); without `whole` only those over all budgets, where the analysis has such."""
    found = []
    for analysis in dict.fromkeys(goodhart["analysis"]):
        rows = goodhart[goodhart["analysis"] == analysis]
        if not whole and (rows["budget"] == ALL).any():
            rows = rows[rows["budget"] == ALL]
        cells = [
            (row["proxy"], row["gold"], row["budget"], row["statistic"].replace("_", " "), _significant(row),
             str(row["n"]), f"{row['p_adjusted']:.2g}" if np.isfinite(row["p_adjusted"]) else "", row["status"])
            for row in rows.to_dict("records")
        ]  # fmt: skip
        caption = f"`goodhart.parquet`, analysis {analysis}; 95 % intervals; p after Holm's correction."
        found.append((str(analysis), Grid(GOODHART_HEADER, cells, caption, stands_on, folded=True)))
    return found


def _significant(row: dict[str, Any]) -> str:
    """Three digits."""
    value, lo, hi = (f"{row[end]:.3g}" for end in ("value", "lo", "hi"))
    if not np.isfinite(row["value"]):
        return "-"
    return f"{value} [{lo}, {hi}]" if np.isfinite([row["lo"], row["hi"]]).all() else value


# ---- divergence, flips, protocols
KL_BLOCK = {
    "mean KL": "kl_nats_per_token", "max": "kl_max", "99.9 %": "kl_p99.9", "99 %": "kl_p99", "median": "kl_p50",
    "10 %": "kl_p10", "5 %": "kl_p5", "1 %": "kl_p1", "min": "kl_min",
}  # fmt: skip
P_BLOCK = {
    "mean \u0394p": "delta_p", "RMS \u0394p": "delta_p_rms", "99 %": "delta_p_p99", "95 %": "delta_p_p95",
    "median": "delta_p_p50", "5 %": "delta_p_p5", "1 %": "delta_p_p1", "same top": "top1",
    "ln(PPL / PPL of reference)": "ln_ppl_ratio", "correlation of log p": "log_prob_correlation",
}  # fmt: skip
STANDARD_ERROR = {
    "kl_nats_per_token": "kl_se", "delta_p": "delta_p_se", "delta_p_rms": "delta_p_rms_se", "top1": "top1_se",
    "ln_ppl_ratio": "ln_ppl_ratio_se",
}  # fmt: skip
KL_NOTE = "KL to the reference over tokens, in nats a token: mean, extremes and percentiles."
P_NOTE = (
    "\u0394p: change of the right token's probability, in points; same top: share of tokens "
    "with the reference's argmax, %. \u00b1 is one standard error, tokens taken as independent as in llama-perplexity; "
    "the intervals in `evaluate.parquet` draw whole windows."
)
FLIPS = ("flips", "flips_to_wrong", "flips_to_right")
FLIPS_NOTE = (
    "Items whose answer changed, %: all = right to wrong + wrong to right. Accuracy shows the difference alone."
)
PROTOCOL = {
    "PPL": ("ppl", "{:.3f} [{:.3f}, {:.3f}]"), "nats a token": ("nll_nats_per_token", "{:.4f}"),
    "median": ("median_nll", "{:.4f}"), "bits a byte": ("bits_per_byte", "{:.4f} [{:.4f}, {:.4f}]"),
    "PPL a word": ("word_perplexity", "{:.5g} [{:.5g}, {:.5g}]"),
}  # fmt: skip
PROTOCOL_NOTE = (
    "Numbers compare with each other, and with published ones, under the same protocol, never across. The median is of "
    "windows, of documents under `lm-eval`."
)


def divergence(plans: pd.DataFrame, evaluate: pd.DataFrame, stands_on: str = "") -> list[Section]:
    """The block of llama-perplexity for every named plan on the first report corpus, and the flips of every task."""
    value = evaluate.set_index(["task", "plan", "metric"])["value"].sort_index()
    answers = named(plans)["plan"]
    answers = answers[answers.isin(evaluate["plan"])]
    corpora = evaluate.loc[(evaluate["metric"] == "kl_se") & ~evaluate["task"].str.endswith("/select"), "task"]
    sections = []
    for corpus in corpora.iloc[:1]:
        grids = []
        for block, note in ((KL_BLOCK, KL_NOTE), (P_BLOCK, P_NOTE)):
            rows = [(plan, *(_told(value[corpus, plan], metric) for metric in block.values())) for plan in answers]
            grids.append(Grid(("plan", *block), rows, note, stands_on))
        sections.append(Section(f"Divergence from the reference on {corpus}", grids))
    if tasks := list(dict.fromkeys(evaluate.loc[evaluate["metric"] == "flips", "task"])):
        rows = [(plan, *(_flipped(value[task, plan]) for task in tasks)) for plan in answers]
        sections.append(Section("Answers that changed", [Grid(("plan", *tasks), rows, FLIPS_NOTE, stands_on)]))
    return sections


def _flipped(value: pd.Series) -> str:
    whole, to_wrong, to_right = (100 * value[name] for name in FLIPS)
    return f"{whole:.1f} = {to_wrong:.1f} + {to_right:.1f}" if whole else "0"


def _told(value: pd.Series, metric: str) -> str:
    """The metric of one plan and task, with its standard error if it has one; probabilities and shares in points."""
    scale, digits = (100, 2) if metric.startswith(("delta_p", "top1")) else (1, 4)
    if metric in STANDARD_ERROR:
        return f"{scale * value[metric]:.{digits}f} \u00b1 {scale * value[STANDARD_ERROR[metric]]:.{digits}f}"
    return f"{scale * value[metric]:.3g}"


def protocols_section(protocols: pd.DataFrame, stands_on: str = "") -> Section:
    """Perplexity of whole texts, text by text and protocol by protocol, and what each protocol does."""
    rows = []
    for (task, plan), part in protocols.groupby(["task", "plan"], sort=False):
        found = part.set_index("metric")[["value", "lo", "hi"]]
        cells = (shape.format(*found.loc[name]) if name in found.index else "-" for name, shape in PROTOCOL.values())
        rows.append((*task.rsplit("/", 1), plan, *cells))
    how = dict(zip(protocols["task"], protocols["protocol"], strict=True))
    rows.sort(key=lambda row: list(how).index("/".join(row[:2])))
    blocks: list[Block] = [
        Grid(("text", "protocol", "plan", *PROTOCOL), rows, PROTOCOL_NOTE, stands_on),
        Bullets([f"`{task}`: {protocol}." for task, protocol in how.items()]),
    ]
    return Section("Perplexity of whole texts, by protocol", blocks)


# ---- verdicts
def verdicts(gates: pd.DataFrame) -> list[str]:
    return [
        f"{_word(row)}  {row.gate}: {row.check} {row.value:.4g}, must be {row.comparison} {row.threshold:g}"
        + (f" ({row.why})" if row.why else "")
        for row in gates.itertuples()
    ]


def _word(row: Any) -> str:
    """WARN: a NO-GO that stops nothing."""
    return "GO" if row.go else {"stop": "NO-GO", "warn": "WARN"}.get(row.mode, f"NO-GO ({row.mode})")


def stamp(gates: pd.DataFrame) -> str:
    return f"{int(gates['go'].sum())} of {len(gates)} checks say GO."


def stands_on(gates: pd.DataFrame, names: Sequence[str] = ()) -> str:
    """The verdict of each of the named gates, of all without names: GO, or what did not say so.

    >>> rows = [("fit", "r2", True, "stop"), ("fit", "r2_rank", False, "fallback"), ("pilot", "gain", False, "warn")]
    >>> stands_on(pd.DataFrame(rows, columns=["gate", "check", "go", "mode"]).assign(value=0.1))
    'fit NO-GO (fallback) r2_rank; pilot WARN gain'
    """
    found = []
    for gate, rows in gates.groupby("gate", sort=False):
        if not names or gate in names:
            refused = [f"{_word(row)} {row.check}" for row in rows.itertuples() if not row.go]
            found.append(f"{gate} {', '.join(refused) or 'GO'}")
    return "; ".join(found)
