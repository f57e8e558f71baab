"""What people read at the end: a table for the terminal and a page, from tables alone (and the time from logs).

`python -m bitalloc.report results/tiny` prints the table of a finished run, and where its time went.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bitalloc import tables
from bitalloc.config import Retrieve
from bitalloc.errors import BitallocError
from bitalloc.progress import clock
from bitalloc.statistics import accuracies

REFERENCE, POOL, BEST = "reference", "random", "best"
LEVELS = ("minimal", "good", "excellent")
PPL_GAIN = (3.0, 5.0, 15.0)  # percent over uniform at equal bytes, at least
DROP = (5.0, 2.0, 1.0)  # points of accuracy below the reference, at most
R2 = (0.6, 0.8, 0.9)  # of log error, at least
STAGES = ("retrieve", "calibrate", "sweep", "fit", "allocate", "compress", "evaluate", "analyze", "report", "gates")
TIMES = ("stage", "jobs", "wall", "CPU", "share of wall")
TIMES_NOTE = "Hours, minutes and seconds of every job's last run, added up; what came from a cache took none."
HEADER = ("plan", "on disk", "bits a weight", "PPL", "KL")


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


def table(plans: pd.DataFrame, evaluate: pd.DataFrame, checkpoints: pd.DataFrame, gates: pd.DataFrame) -> str:
    """PLANS, EVALUATE, CHECKPOINTS and GATES -> plain text: the named plans, the reference first, then the verdicts."""
    header, rows = _rows(plans, evaluate, checkpoints)
    return "\n".join([_aligned(header, rows), _note(evaluate), "", *_verdicts(gates)])


def times(logs: Path) -> list[tuple[str, ...]]:
    """Rows of TIMES, from the logs of a model's jobs, each of its last run; none without a finished job.

    Jobs that failed or were killed have left no time, nor has what came from Snakemake's cache.
    """
    found = [record for record in map(_record, sorted(logs.rglob("*.log"))) if "wall_s" in record]
    if not found:
        return []
    frame = pd.DataFrame(found)
    words = frame["rule"].str.partition("_")[0]
    frame["stage"] = words.replace({"gate": "gates", "stop": "gates"})
    sums = frame.groupby("stage").agg(jobs=("rule", "size"), wall=("wall_s", "sum"), cpu=("cpu_s", "sum"))
    order = sorted(sums.index, key=[*STAGES, *sums.index].index)
    whole = sums["wall"].sum()
    rows = [
        (row.Index, str(row.jobs), clock(row.wall), clock(row.cpu), f"{100 * row.wall / whole:.0f} %")
        for row in sums.loc[order].itertuples()
    ]
    return [*rows, ("all", str(len(frame)), clock(whole), clock(sums["cpu"].sum()), "100 %")]


def _record(log: Path) -> dict[str, Any]:
    try:
        record = json.loads(log.read_text())
    except (OSError, ValueError):  # cut short, with an error below it, or left empty by the cache
        return {}
    return record if isinstance(record, dict) else {}


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str] | None]) -> str:
    """Plain text, the first column to the left, between rules; None is an empty line."""
    cells = [header, *(row for row in rows if row)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "-" * len(line(header))
    body = [line(row) if row else "" for row in rows]
    return "\n".join([line(header), rule, *body, rule])


def markdown(
    model: str,
    *,
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    checkpoints: pd.DataFrame,
    gates: pd.DataFrame,
    law: pd.DataFrame,
    goodhart: pd.DataFrame,
    sentences: Sequence[str],
    figures: Sequence[str],
    times: Sequence[Sequence[str]] = (),
    protocols: pd.DataFrame | None = None,
) -> str:
    """The page of a model. `sentences` sum up GOODHART; `figures` are links relative to the page; `times`: TIMES;
    `protocols`: EVALUATE of the suite of this name.
    """
    header, rows = _rows(plans, evaluate, checkpoints)
    tables_read = "plans, evaluate, checkpoints, goodhart, law, gates"
    parts = [
        f"# {model}",
        "\n".join(sentences),
        "## Plans",
        _grid(header, [row for row in rows if row]),
        _note(evaluate),
        "## What was reached",
        "A level counts as reached when the whole 95 % interval is beyond it.",
        _grid(("criterion", "value", *LEVELS, "reached"), _success(goodhart, law)),
        *_divergence(plans, evaluate),
        *([] if protocols is None else _protocols(protocols)),
        "## Figures",
        "\n\n".join(f"![{Path(figure).stem}]({figure})" for figure in figures),
        "## What this stands on",
        f"Tables beside this page (`.parquet`): {tables_read}. {_stamp(gates)}",
        "\n".join(f"- {line}" for line in _verdicts(gates)),
    ]
    if times:
        parts += ["## Where the time went", _grid(TIMES, times), TIMES_NOTE]
    return "\n\n".join(parts) + "\n"


LOADING = {
    "huggingface": """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this/folder")  # needs compressed-tensors
{adapter}""",
    "gguf": """from llama_cpp import Llama
model = Llama("this-file.gguf")  # matrices are stored in the next larger types of GGUF: see docs/formats.md
""",
    "gptq": """from gptqmodel import GPTQModel
model = GPTQModel.load("this/folder")
""",
}
ADAPTER = """
import torch
from peft import PeftModel
with torch.inference_mode():
    model(torch.tensor([[0]]))  # unpacks the weights, which the adapter needs
model = PeftModel.from_pretrained(model, "this/folder/adapter")
"""


def card(
    model: str,
    name: str,
    *,
    form: str,
    nbytes: int,
    base: str | None,
    fused: Sequence[str],
    licence: str | None,
    calibrated: Retrieve,
    plan: pd.DataFrame,
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    gates: pd.DataFrame,
) -> str:
    """The model card of plan `name` in format `form`: what it is, how to load it, and what was measured."""
    own = plans.set_index("plan").loc[name]
    peers = plans[(plans["budget"] == own["budget"]) & ((plans["plan"] == name) | (plans["strategy"] == "uniform"))]
    header, rows = _rows(peers, evaluate, empty_checkpoints())
    counts = plan.value_counts(["quantizer", "bits", "group_size", "rank"]).sort_index()
    chosen = [(quantizer, *map(str, (*rest, n))) for (quantizer, *rest), n in counts.items()]
    windows = f"{calibrated.calibrate_windows} windows of {calibrated.window} tokens"
    loading = LOADING[form].format(adapter=ADAPTER if (plan["rank"] > 0).any() else "")
    front = [f"license: {licence}"] if licence else []
    front += [f"base_model: {base}"] if base else []
    merging = "servers that merge q, k and v, or gate and up"
    fusing = f"Fit for {merging}: {' and '.join(fused)} take one option in each block."
    corpus = _note(evaluate).partition(";")[0]
    parts = [
        "\n".join(["---", *front, "tags: [bitalloc, quantized]", "---"]),
        f"# {model}, {name}",
        f"{base or model} with its {len(plan)} matrices at {own['bits_per_weight']:.3f} bits a weight, for a budget of "
        f"{own['budget']}; embeddings, norms and head as they were. {human(nbytes)} on disk ({nbytes:,} bytes). "
        f"Made by bitalloc. Licence of the base model: {licence or 'not stated beside its weights; see its page'}.",
        f"```python\n{loading.strip()}\n```",
        "## Plan",
        _grid(("quantizer", "bits", "group size", "rank", "matrices"), chosen),
        f"Calibrated on {windows} of {', '.join(calibrated.calibrate)}. "
        + (fusing if fused else f"Not made for {merging}, which need one option for these."),
        "## Evaluation",
        _grid((header[0], *header[2:]), [(row[0], *row[2:]) for row in rows if row]),
        f"{corpus}; tasks in % right. `reference` is the unquantised model. Scores were taken inside bitalloc, with "
        + (
            "the plan's own weights, some of which this format rounds again."
            if form == "gguf"
            else "the weights that this checkpoint unpacks to."
        ),
        "## What this stands on",
        _stamp(gates),
        "\n".join(f"- {line}" for line in _verdicts(gates)),
    ]
    return "\n\n".join(parts) + "\n"


def empty_checkpoints() -> pd.DataFrame:
    return pd.DataFrame({column.name: [] for column in tables.CHECKPOINTS.columns})


def _rows(
    plans: pd.DataFrame, evaluate: pd.DataFrame, checkpoints: pd.DataFrame
) -> tuple[tuple[str, ...], list[tuple[str, ...] | None]]:
    """Header and rows; None stands between budgets."""
    right = accuracies(evaluate)
    scores = pd.concat([evaluate[evaluate["metric"] != "acc"], right]).set_index(["plan", "metric", "task"])
    corpora = evaluate.loc[(evaluate["metric"] == "ppl") & ~evaluate["task"].str.endswith("/select"), "task"]
    if corpora.empty:
        raise BitallocError("evaluate holds no ppl of the report split: add the suite perplexity to evaluate")
    tasks = dict(zip(right["task"], right["status"], strict=True))
    on_disk = checkpoints.set_index("plan")["nbytes"]

    def cell(plan: str, metric: str, task: str, shape: str, scale: float = 1.0) -> str:
        if (plan, metric, task) not in scores.index:
            return "-"
        row = scores.loc[(plan, metric, task)]
        return shape.format(*(scale * row[name] for name in ("value", "lo", "hi")))

    def row(plan: str, size: str, bits: str) -> tuple[str, ...]:
        ppl = cell(plan, "ppl", corpora.iloc[0], "{:.3f} [{:.3f}, {:.3f}]")
        kl = cell(plan, "kl_nats_per_token", corpora.iloc[0], "{:.4f}")
        return (plan, size, bits, ppl, kl, *(cell(plan, "acc", task, "{:.1f}", 100.0) for task in tasks))

    found: list[tuple[str, ...] | None] = [row(REFERENCE, "-", "16")]
    named = tables.without_arms(plans[plans["strategy"] != POOL])
    order = named.groupby("budget", sort=False)["bits_per_weight"].mean().sort_values().index
    for budget in order:
        found.append(None)
        for plan in named[named["budget"] == budget].itertuples():
            size = human(on_disk[plan.plan]) if plan.plan in on_disk.index else f"({human(plan.checkpoint_nbytes)})"
            found.append(row(plan.plan, size, f"{plan.bits_per_weight:.3f}"))
    return (*HEADER, *(f"{task} (floor)" if at == "floor" else task for task, at in tasks.items())), found


def _note(evaluate: pd.DataFrame) -> str:
    corpus = evaluate.loc[(evaluate["metric"] == "ppl") & ~evaluate["task"].str.endswith("/select"), "task"].iloc[0]
    return (
        f"PPL and KL (nats a token) on {corpus}, 95 % intervals; tasks in % right; sizes in brackets are predicted: "
        "no checkpoint was written."
    )


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
BLOCK_NOTE = (
    "KL in nats a token; \u0394p: change of the right token's probability, in points; same top: share of tokens "
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


def _divergence(plans: pd.DataFrame, evaluate: pd.DataFrame) -> list[str]:
    """The block of llama-perplexity for every named plan on the first report corpus, and the flips of every task."""
    value = evaluate.set_index(["task", "plan", "metric"])["value"].sort_index()
    named = tables.without_arms(plans[plans["strategy"] != POOL])["plan"]
    named = named[named.isin(evaluate["plan"])]
    corpora = evaluate.loc[(evaluate["metric"] == "kl_se") & ~evaluate["task"].str.endswith("/select"), "task"]
    parts = []
    for corpus in corpora.iloc[:1]:
        parts.append(f"## Divergence from the reference on {corpus}")
        for block in (KL_BLOCK, P_BLOCK):
            rows = [(plan, *(_told(value[corpus, plan], metric) for metric in block.values())) for plan in named]
            parts.append(_grid(("plan", *block), rows))
        parts.append(BLOCK_NOTE)
    if tasks := list(dict.fromkeys(evaluate.loc[evaluate["metric"] == "flips", "task"])):
        rows = [(plan, *(_flipped(value[task, plan]) for task in tasks)) for plan in named]
        parts += ["## Answers that changed", _grid(("plan", *tasks), rows), FLIPS_NOTE]
    return parts


def _flipped(value: pd.Series) -> str:
    whole, to_wrong, to_right = (100 * value[name] for name in FLIPS)
    return f"{whole:.1f} = {to_wrong:.1f} + {to_right:.1f}" if whole else "0"


def _told(value: pd.Series, metric: str) -> str:
    """The metric of one plan and task, with its standard error if it has one; probabilities and shares in points."""
    scale, digits = (100, 2) if metric.startswith(("delta_p", "top1")) else (1, 4)
    if metric in STANDARD_ERROR:
        return f"{scale * value[metric]:.{digits}f} \u00b1 {scale * value[STANDARD_ERROR[metric]]:.{digits}f}"
    return f"{scale * value[metric]:.3g}"


def _protocols(protocols: pd.DataFrame) -> list[str]:
    """Perplexity of whole texts, text by text and protocol by protocol, and what each protocol does."""
    rows = []
    for (task, plan), part in protocols.groupby(["task", "plan"], sort=False):
        found = part.set_index("metric")[["value", "lo", "hi"]]
        cells = (shape.format(*found.loc[name]) if name in found.index else "-" for name, shape in PROTOCOL.values())
        rows.append((*task.rsplit("/", 1), plan, *cells))
    how = dict(zip(protocols["task"], protocols["protocol"], strict=True))
    rows.sort(key=lambda row: list(how).index("/".join(row[:2])))
    return [
        "## Perplexity of whole texts, by protocol",
        _grid(
            ("text", "protocol", "plan", *PROTOCOL), sorted(rows, key=lambda row: list(how).index("/".join(row[:2])))
        ),
        PROTOCOL_NOTE,
        "\n".join(f"- `{task}`: {protocol}." for task, protocol in how.items()),
    ]


def _verdicts(gates: pd.DataFrame) -> list[str]:
    return [
        f"{_word(row)}  {row.gate}: {row.check} {row.value:.4g}, must be {row.comparison} {row.threshold:g}"
        + (f" ({row.why})" if row.why else "")
        for row in gates.itertuples()
    ]


def _word(row: Any) -> str:
    """WARN: a NO-GO that stops nothing."""
    return "GO" if row.go else {"stop": "NO-GO", "warn": "WARN"}.get(row.mode, f"NO-GO ({row.mode})")


def _stamp(gates: pd.DataFrame) -> str:
    return f"{int(gates['go'].sum())} of {len(gates)} checks say GO."


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _success(goodhart: pd.DataFrame, law: pd.DataFrame) -> list[tuple[str, ...]]:
    """Each criterion with its levels; the unfavourable end of the interval decides."""
    best = goodhart[(goodhart["analysis"] == "gain") & (goodhart["proxy"] == BEST)]
    found = []
    gains = best[best["statistic"] == "ppl_gain_percent"]
    for row in gains[gains["gold"] == (gains["gold"].iloc[0] if len(gains) else "")].itertuples():
        name = f"PPL gain of best over uniform at {row.budget}, %"
        found.append(_criterion(name, (row.value, row.lo, row.hi), PPL_GAIN, 1))
    drops = best[(best["statistic"] == "accuracy_points_vs_reference") & (best["status"] != "floor")]
    for budget, part in drops.groupby("budget", sort=False):
        worst = part.loc[part["value"].idxmin()]
        name = f"accuracy that best loses at {budget}, points, worst task ({worst['gold']})"
        found.append(_criterion(name, (-worst["value"], -worst["hi"], -worst["lo"]), DROP, 1))
    r2 = law[(law["scope"] == "pooled") & (law["statistic"] == "r2_log") & law["value"].notna()]
    if len(r2):
        row = r2.loc[r2["value"].idxmax()]
        found.append(
            _criterion(f"R\u00b2 of log error, {row['form']} law", (row["value"], row["lo"], row["hi"]), R2, 3)
        )
    return found


def _criterion(
    name: str, interval: tuple[float, float, float], levels: Sequence[float], digits: int
) -> tuple[str, ...]:
    value, lo, hi = interval
    falling = levels[0] > levels[-1]
    reached = [hi <= level if falling else lo >= level for level in levels]
    sign = "\u2264" if falling else "\u2265"
    level = LEVELS[sum(reached) - 1] if any(reached) else "none"
    shown = f"{value:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"
    return (name, shown, *(f"{sign} {each:g}" for each in levels), level)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1:
        raise BitallocError("usage: python -m bitalloc.report results/<model>")
    folder = Path(arguments[0])
    read = {each.name: each.read(folder / f"{each.name}.parquet") for each in
            (tables.PLANS, tables.EVALUATE, tables.CHECKPOINTS, tables.GATES)}  # fmt: skip
    print(table(**read))
    place = folder.absolute()
    if rows := times(place.parents[1] / "logs" / place.name):
        print("", _aligned(TIMES, rows), TIMES_NOTE, sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BitallocError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
