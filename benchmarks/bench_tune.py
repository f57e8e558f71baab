"""Learned rounding, each technique off in turn: KL on every report corpus, at the very bytes of the swept plan.

python benchmarks/bench_tune.py [--models tiny stories260k] [--rows default ..] [--plans best] [--seeds 1]  ->  a table,
and benchmarks/results/tune.json

    swept        the plan of each budget as GPTQ left it: `best`, or others (--plans best bits_only)
    default      the settings of the model; the rows from `polish` on depart from them by what their name says
    blocks       without the polish; the rows after it depart from that

KL on the select split, nats a token, and on each corpus of the report split; x: as a share of swept. Seconds are
those of the tuning, one thread, blocks that another row has done included.

`--seeds` repeats `default` with other draws of windows and steps; their spread is the interval (t, 95 %). Needs the
plans of a model (`snakemake --cores 2 results/tiny/plans.parquet`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from scipy import stats

from bitalloc import config
from bitalloc.experiments import Experiments, open_experiments
from bitalloc.models import load_model, set_weight
from bitalloc.option import from_row
from bitalloc.provenance import run_record
from bitalloc.quant import CompressedMatrix
from bitalloc.suites.scoring import Head, Windows, compare, hidden
from bitalloc.tables import PLAN, TOKENS
from bitalloc.tune import Tuned, tune

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "polish no codes": {"polish_learn": ["scales", "factors"]},
    "polish codes alone": {"polish_learn": ["rounding"]},
    "polish alone": {"iterations": 0},
    "no scales": {"learn": ["rounding"], "polish_learn": ["rounding", "factors"]},
    "original inputs, polished": {"inputs": "original"},
    "from nearest, polished": {"start": "nearest"},
    # the grid that the defaults were chosen from, on select windows of models that nothing is compared on (docs/LOG.md)
    "polish at .0003": {"polish_rate": 0.0003},
    "polish at .001": {"polish_rate": 0.001},
    "polish at .003": {"polish_rate": 0.003},
    "KL alone": {"polish_truth": 0},
    "twice the NLL": {"polish_truth": 0.3},
    "half the blocks' steps": {"iterations": 100},
    "100 and 300 steps": {"iterations": 100, "polish": 300},
    # the blocks by themselves: the polish would hide what they owe to each technique
    "blocks": {"polish": 0},
    "rounding only": {"polish": 0, "learn": ["rounding"]},
    "scales only": {"polish": 0, "learn": ["scales"]},
    "+ zeros": {"polish": 0, "learn": ["rounding", "scales", "zeros"]},
    "+ factors": {"polish": 0, "learn": ["rounding", "scales", "factors"]},
    "adam": {"polish": 0, "optimizer": "adam", "rate": 0.005},
    "50 steps": {"polish": 0, "iterations": 50},
    "1000 steps": {"polish": 0, "iterations": 1000},
    "from nearest": {"polish": 0, "start": "nearest"},
    "original inputs": {"polish": 0, "inputs": "original"},
}


class Model:
    """A model with its tables, and what a plan does to it."""

    def __init__(self, name: str) -> None:
        sheet = [yaml.safe_load(Path(f"config/{part}.yaml").read_text()) for part in ("config", "models")]
        self.name, self.settings = name, config.parse(sheet[0] | sheet[1]).for_model(name)
        self.folder = Path("results") / name
        tables = ["inventory", "moments", *(["embeddings"] if self.settings.sweep.embedding_bits != [16] else [])]
        files = {"checkpoint": self.folder / "checkpoint.json"}
        files |= {table: self.folder / f"{table}.parquet" for table in tables}
        self.experiments: Experiments = open_experiments(files, self.settings)
        self.inventory, self.tokens = self.experiments.inventory, TOKENS.read(self.folder / "tokens.parquet")
        self.model = load_model(self.experiments.checkpoint.path, device=self.experiments.device)
        self.head = Head(self.model).fixed()
        self.windows = {
            split: Windows(self.tokens[self.tokens["split"] == split], batch=8, device=self.experiments.device)
            for split in ("select", "report")
        }
        with torch.inference_mode():
            self.reference = {
                split: [hidden(self.model, batch) for batch in windows.batches]
                for split, windows in self.windows.items()
            }

    def plans(self, strategies: list[str]) -> Iterator[tuple[str, pd.DataFrame]]:
        for strategy in strategies:
            for path in sorted((self.folder / "plans").glob(f"{strategy}-*.parquet")):
                yield path.stem, PLAN.read(path)

    @torch.inference_mode()
    def kl(self, plan: pd.DataFrame, matrix: Callable[..., CompressedMatrix]) -> dict[str, float]:
        """`<corpus>/<split>` -> nats a token."""
        for row in plan.to_dict("records"):
            W_OI = matrix(row["layer"], from_row(row, self.experiments.sweep)).dequantize()
            set_weight(self.model, self.experiments.checkpoint.family, row["layer"], W_OI)
        head, found = Head(self.model), {}
        for split, windows in self.windows.items():
            score = np.zeros(len(windows.frame))
            for batch, reference_ND in zip(windows.batches, self.reference[split], strict=True):
                scores = compare(head, batch, hidden(self.model, batch), reference_ND, self.head)["kl"]
                for owner, kl_T in batch.parted(scores):
                    score[owner] = kl_T.mean().item()
            means = pd.Series(score).groupby(windows.frame["corpus"].to_numpy(), sort=False).mean()
            found |= {f"{corpus}/{split}": float(value) for corpus, value in means.items()}
        return found

    def tuned(self, name: str, plan: pd.DataFrame, seed: int, **over: Any) -> dict[str, Any]:
        frame = tune(
            name=name,
            plan=plan,
            tokens=self.tokens,
            inventory=self.inventory,
            experiments=self.experiments,
            settings=self.settings.tune.model_copy(update=over),
            seed=seed,
        )
        blocks = frame[frame["part"] == "block"]
        return {
            "kl": self.kl(plan, Tuned(self.experiments, plan, frame.to_dict("records")).matrix),
            "block_error": blocks["loss_after"].tolist(),
            "block_error_swept": blocks["loss_before"].tolist(),
            "kept": frame["kept"].tolist(),
            "step": frame["step"].tolist(),
            "wall_s": frame["wall_s"].sum(),
        }


def told(row: dict[str, Any], swept: dict[str, float]) -> str:
    cells = [f"{corpus} {value:.4f} ({value / swept[corpus]:.2f}x)" for corpus, value in row["kl"].items()]
    return f"{row['plan']:14}{row['row']:20}{row['seed']:>2}  " + "  ".join(cells) + f"  {row.get('wall_s', 0):6.0f} s"


def interval(values: list[float]) -> list[float]:
    """Mean and the ends of its 95 % interval (t) over seeds."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return [mean, mean - half, mean + half]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["tiny", "stories260k"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--budgets", nargs="+", help="e.g. 2.5bpw; all")
    parser.add_argument("--plans", nargs="+", default=["best"], help="maps; of all but the first `default` alone")
    parser.add_argument("--seeds", type=int, default=1, help="of `default`")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tune.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows: list[dict[str, Any]] = []
    intervals: dict[str, dict[str, list[float]]] = {}
    for model in map(Model, arguments.models):
        for plan, frame in model.plans(arguments.plans):
            if arguments.budgets and plan.partition("-")[2] not in arguments.budgets:
                continue
            swept = model.kl(frame, model.experiments.matrix)
            place = {"model": model.name, "plan": plan}
            rows.append({**place, "row": "swept", "seed": 0, "kl": swept})
            print(told(rows[-1], swept), flush=True)
            for name in arguments.rows if plan.startswith(f"{arguments.plans[0]}-") else ["default"]:
                seeds = range(arguments.seeds if name == "default" else 1)
                for seed in seeds:
                    rows.append({**place, "row": name, "seed": seed, **model.tuned(plan, frame, seed, **ROWS[name])})
                    print(told(rows[-1], swept), flush=True)
                if len(seeds) > 1:
                    found = [row["kl"] for row in rows[-len(seeds) :]]
                    means = {corpus: interval([kl[corpus] for kl in found]) for corpus in swept}
                    intervals[f"{model.name} {plan}"] = means
                    print(*(f"    {c}: {m:.4f} [{a:.4f}, {b:.4f}]" for c, (m, a, b) in means.items()), flush=True)
                record = {"run": run_record("torch"), "rows": rows, "default_over_seeds": intervals}
                arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
