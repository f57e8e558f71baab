"""What people read at the end: a table for the terminal and a page, from tables alone (and the time from logs).

`python -m bitalloc.report results/tiny` prints the table of a finished run, and where its time went.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bitalloc import tables
from bitalloc.config import Retrieve
from bitalloc.documents import Bullets, Document, Grid, Picture, Section, grids, markdown
from bitalloc.errors import BitallocError
from bitalloc.progress import clock

STAGES = ("retrieve", "calibrate", "sweep", "fit", "allocate", "compress", "evaluate", "analyze", "report", "gates")
TABLES_READ = "success, plans, evaluate, checkpoints, controls, phase, goodhart, law, gates"
STANDS_ON = dict.fromkeys(("sensitivity", "errors", "law"), ("sweep", "fit"))  # figure -> gates; others: all of them
TIMES = ("stage", "jobs", "wall", "CPU", "share of wall")
TIMES_NOTE = "Hours, minutes and seconds of every job's last run, added up; what came from a cache took none."


def table(plans: pd.DataFrame, evaluate: pd.DataFrame, checkpoints: pd.DataFrame, gates: pd.DataFrame) -> str:
    """PLANS, EVALUATE, CHECKPOINTS and GATES -> plain text: the named plans, the reference first, then the verdicts."""
    header, rows = grids.plan_rows(plans, evaluate, checkpoints)
    return "\n".join([_aligned(header, rows), grids.plans_note(evaluate), "", *grids.verdicts(gates)])


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


def page(
    model: str,
    *,
    plans: pd.DataFrame,
    evaluate: pd.DataFrame,
    checkpoints: pd.DataFrame,
    gates: pd.DataFrame,
    law: pd.DataFrame,
    goodhart: pd.DataFrame,
    sentences: Sequence[str],
    figures: Sequence[Path],
    captions: Mapping[str, str] | None = None,
    success: pd.DataFrame,
    controls: pd.DataFrame,
    times: Sequence[Sequence[str]] = (),
    protocols: pd.DataFrame | None = None,
    long: bool = False,
) -> Document:
    """What the pages of a model say, the levels reached first.

    `sentences` sum up GOODHART; `captions` are those of the figures by their names; `times`: TIMES; `protocols`:
    EVALUATE of the suite of this name; `long`: with every row of GOODHART.
    """
    captions, whole = captions or {}, grids.stands_on(gates)
    every = [grid for _, grid in grids.goodhart_grids(goodhart, whole)]
    sections = [
        Section("What was reached", [grids.success_grid(success)]),
        Section("What was found", sentences),
        Section("Plans", [
            grids.plans_grid(plans, evaluate, checkpoints, whole), grids.gains_grid(goodhart, whole),
        ]),
        Section("Figures", [
            Picture(path, captions.get(path.stem, ""), grids.stands_on(gates, STANDS_ON.get(path.stem, ())))
            for path in figures
        ]),
        Section("Rank versus bits", [grids.controls_grid(controls, whole)]),
        Section("The law", [grids.law_grid(law, grids.stands_on(gates, STANDS_ON["law"]))]),
        *grids.divergence(plans, evaluate, whole),
        *([] if protocols is None else [grids.protocols_section(protocols, whole)]),
        *([Section("Every row of the Goodhart analysis", every)] if long else []),
        Section("What this stands on", [
            f"Tables beside this page (`.parquet`): {TABLES_READ}. {grids.stamp(gates)}",
            Bullets(grids.verdicts(gates)),
        ]),
    ]  # fmt: skip
    if times:
        sections.append(Section("Where the time went", [Grid(TIMES, times, TIMES_NOTE)]))
    return Document(model, sections)


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
    header, rows = grids.plan_rows(peers, evaluate, empty_checkpoints())
    counts = plan.value_counts(["quantizer", "bits", "group_size", "rank"]).sort_index()
    chosen = [(quantizer, *map(str, (*rest, n))) for (quantizer, *rest), n in counts.items()]
    windows = f"{calibrated.calibrate_windows} windows of {calibrated.window} tokens"
    loading = LOADING[form].format(adapter=ADAPTER if (plan["rank"] > 0).any() else "")
    front = [f"license: {licence}"] if licence else []
    front += [f"base_model: {base}"] if base else []
    merging = "servers that merge q, k and v, or gate and up"
    fusing = f"Fit for {merging}: {' and '.join(fused)} take one option in each block."
    corpus = grids.plans_note(evaluate).partition(";")[0]
    parts = [
        "\n".join(["---", *front, "tags: [bitalloc, quantized]", "---"]),
        f"# {model}, {name}",
        f"{base or model} with its {len(plan)} matrices at {own['bits_per_weight']:.3f} bits a weight, for a budget of "
        f"{own['budget']}; embeddings, norms and head as they were. {grids.human(nbytes)} on disk ({nbytes:,} bytes). "
        f"Made by bitalloc. Licence of the base model: {licence or 'not stated beside its weights; see its page'}.",
        f"```python\n{loading.strip()}\n```",
        "## Plan",
        markdown.grid(("quantizer", "bits", "group size", "rank", "matrices"), chosen),
        f"Calibrated on {windows} of {', '.join(calibrated.calibrate)}. "
        + (fusing if fused else f"Not made for {merging}, which need one option for these."),
        "## Evaluation",
        markdown.grid((header[0], *header[2:]), [(row[0], *row[2:]) for row in rows if row]),
        f"{corpus}; tasks in % right. `reference` is the unquantised model. Scores were taken inside bitalloc, with "
        + (
            "the plan's own weights, some of which this format rounds again."
            if form == "gguf"
            else "the weights that this checkpoint unpacks to."
        ),
        "## What this stands on",
        grids.stamp(gates),
        "\n".join(f"- {line}" for line in grids.verdicts(gates)),
    ]
    return "\n\n".join(parts) + "\n"


def empty_checkpoints() -> pd.DataFrame:
    return pd.DataFrame({column.name: [] for column in tables.CHECKPOINTS.columns})


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
