"""Plots of a run, from its records alone: `runs/<run_id>/plots/`. No model, no network, no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitalloc import figures
from bitalloc.errors import BitallocError
from bitalloc.profile import records

PLOTS = {"profile": figures.profile, "perplexity": figures.perplexity, "long_context": figures.long_context}


def plots(folder: Path) -> list[Path]:
    """One figure for each stage that the run has records of; raises `BitallocError` where there are none."""
    whole = records.frame(records.read_jsonl(folder / "metrics.jsonl"))
    made = []
    for stage, draw in PLOTS.items():
        part = whole[whole["stage"] == stage].reset_index(drop=True)
        if len(part):
            made.append(folder / "plots" / f"{stage}.png")
            draw(part, made[-1], model=part["model"].iloc[0])
    if not made:
        raise BitallocError(f"{folder} holds no records yet; run eval_ppl, eval_long_context or profile_model first")
    return made


def command(description: str | None, arguments: list[str] | None = None) -> int:
    """`--run-dir runs/ID`: 0, or 1 and one line on stderr."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="runs/<run_id>, with its metrics.jsonl")
    try:
        for path in plots(parser.parse_args(arguments).run_dir):
            print(path)
    except BitallocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
