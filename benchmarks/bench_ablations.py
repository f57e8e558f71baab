"""What every technique behind `tuned` is worth: each switched off in turn, at equal bytes.

python benchmarks/bench_ablations.py [--models gpt2_tiny_6] [--budgets 2.6 3.3] [--rows ..]  ->  a table, and
benchmarks/results/ablations.json

KL to the unquantised model on the windows of the report split, and as a multiple of that of `tuned` (95 %: paired
bootstrap over windows; above 1 the technique pays). Codes are learned by the defaults of `tune`. What a model's sheet
offers (group sizes, ranks) is what is switched off. Shards are shared by the rows, finished rows by later runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from comparison import Evaluation, ratio, summary
from project import ROOT, Project, subject
from running import FailedError

from bitalloc.errors import BitallocError
from bitalloc.provenance import run_record
from bitalloc.store import write_atomically

# row -> (the plan that is taken, sections that depart from the model's)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "tuned": ("tuned", {}),
    "learned codes off (best)": ("best", {}),
    "learned scales off": ("tuned", {"tune": {"learn": ["rounding"], "polish_learn": ["rounding", "factors"]}}),
    "learned rounding off": ("tuned", {"tune": {"learn": ["scales"], "polish_learn": ["scales", "factors"]}}),
    "polish off": ("tuned", {"tune": {"polish": 0}}),
    "blocks off": ("tuned", {"tune": {"iterations": 0}}),
    "sequential calibration off": ("tuned", {"tune": {"inputs": "original"}}),
    "GPTQ start off": ("tuned", {"tune": {"start": "nearest"}}),
    "low rank off": ("tuned", {"sweep": {"ranks": [0]}}),
    "group size no option": ("tuned", {"sweep": {"group_sizes": [64]}}),
    "activation order off": ("tuned", {"sweep": {"act_order": False}}),
    "runners-up off": ("tuned", {"allocate": {"runners_up": 0}}),
}


def rows(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each technique and budget; without KL where the model cannot do without."""
    whole, budgets = subject(model), [f"{float(budget):g}bpw" for budget in arguments.budgets]
    folder = arguments.work / f"{whole.name}-{whole.content[:8]}"
    given = {"seed": 0, "threads": arguments.threads, "limit_s": 7200}
    found: list[dict[str, Any]] = []
    scores: dict[tuple[str, str], pd.DataFrame] = {}
    evaluation = None
    for name in arguments.rows:
        plan, over = ROWS[name]
        project = Project(folder, whole, **given, over=over)
        try:
            took = project.run("checkpoints.parquet", budgets=budgets, plans=[plan])
        except FailedError as failed:
            found.append({"model": whole.name, "row": name, "budget": None, "kl": None, "why": str(failed)})
            print(f"{whole.name} {name}: {failed}", flush=True)
            continue
        evaluation = evaluation or Evaluation(whole.path, project.tokens(), layers=list(project.layers()))
        for budget in budgets:
            told = project.export(plan, budget, folder)
            scores[name, budget] = frame = evaluation.scores(folder / "weights.safetensors")
            value, lo, hi = ratio(frame, scores["tuned", budget])
            place = {"model": whole.name, "row": name, "budget": float(budget.removesuffix("bpw")), "why": None}
            times = {"times": value, "times_lo": lo, "times_hi": hi, "cpu_s": took.cpu_s / len(budgets)}
            found.append({**place, **summary(frame), **times, "setting": told["setting"]})
            print(
                f"{whole.name} {budget:8}{name:28} KL {found[-1]['kl']:.4f}  {value:.2f} [{lo:.2f}, {hi:.2f}]",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2_tiny_6"], help="names of config/models.yaml, or folders")
    parser.add_argument("--budgets", nargs="+", default=["2.6", "3.3"], help="bits a weight")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="`tuned` first")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / ".peers/ablations", help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results/ablations.json")
    arguments = parser.parse_args()
    try:
        found = [row for model in arguments.models for row in rows(model, arguments)]
    except (BitallocError, FailedError) as error:
        raise SystemExit(f"error: {error}") from None
    record = {"run": run_record("torch", "transformers"), "rows": found}
    write_atomically(arguments.output, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
