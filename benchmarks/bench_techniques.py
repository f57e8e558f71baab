"""Techniques of rounding switched off, or on, in turn: KL and PPL on report windows, of swept and of learned codes.

python benchmarks/bench_techniques.py [--models gpt2_tiny_6 /a/folder] [--budgets 2.6 3.3] [--techniques ..]
->  a table, and benchmarks/results/techniques.json

    swept      what the quantiser leaves (GPTQ), under the exact optimum of measured error x measured KL at the budget
    learned    the same after `bitalloc.tune` with its defaults, at the very bytes

Each row departs in one thing from the default: damping .1, activation order, clipping search, codes with zeros, moments
of the unquantised model, group size an option (32, 64, 128), no rank. Rows that change what is on offer (symmetric
codes, group size, rank) solve the allocation anew for the same bytes, all others keep the default's map. `times` is KL
over that of the default with codes of the same kind, and of the default's learned codes over its swept ones;
`ppl_times` is PPL over PPL. 95 % intervals (paired bootstrap over windows); below 1 the row is better. They do not hold
the luck of learning: how far apart other draws of its windows lie does (`another draw`, `a third draw`).

Shards are kept in `--work`: a run that was broken off, or is repeated, recalls what was swept and learned, and `cpu_s`
is what the last run took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from comparison import perplexity_ratio, ratio, summary
from project import ROOT
from techniques import Made, Study, by_matrix, clipped, folded, nearest, offer, rotated, sequential, setting

from bitalloc.errors import BitallocError
from bitalloc.provenance import run_record
from bitalloc.store import write_atomically

# row -> technique, and settings of `tune` that depart from its defaults; None: codes are not learned
ROWS: dict[str, tuple[Callable[[Study, float], Made], dict[str, Any] | None]] = {
    "default": (setting, {}),
    "no error feedback": (nearest, {}),
    "no activation order": (partial(setting, act_order=False), {}),
    "damping .01": (partial(setting, damping=0.01), {}),
    "damping 1": (partial(setting, damping=1.0), {}),
    "damping and order by matrix": (by_matrix, {}),
    "no clipping search": (partial(clipped, most=[1.0]), {}),
    "clipping down to .8": (partial(clipped, most=[0.8]), {}),
    "clipping by matrix": (partial(clipped, most=[1.0, 0.9, 0.8, 0.7, 0.5]), {}),
    "sequential calibration": (sequential, {}),
    "rotated and folded": (folded, {}),
    "rotated at run time": (rotated, None),
    "symmetric codes": (partial(offer, symmetric=True), {}),
    "group size 64": (partial(offer, group_sizes=[64]), {}),
    "group size 128": (partial(offer, group_sizes=[128]), {}),
    "rank, 8-bit factors": (partial(offer, ranks=[0, 2, 4, 8]), {}),
    "rank, 16-bit factors": (partial(offer, ranks=[0, 2, 4, 8], factor_bits=16), {}),
    "another draw": (setting, {"seed": 1}),
    "a third draw": (setting, {"seed": 2}),
    "no polish": (setting, {"polish": 0}),
    "no truth in the polish": (setting, {"polish_truth": 0}),
    "no codes in the polish": (setting, {"polish_learn": ["scales", "factors"]}),
    "no blocks": (setting, {"iterations": 0}),
    "no learned scales": (setting, {"learn": ["rounding"], "polish_learn": ["rounding", "factors"]}),
    "no learned rounding": (setting, {"learn": ["scales"], "polish_learn": ["scales", "factors"]}),
    "learned from nearest": (setting, {"start": "nearest"}),
    "learned from original inputs": (setting, {"inputs": "original"}),
}
KEY = ("model", "budget", "technique", "codes")
TIMES, PPL_TIMES = ("times", "times_lo", "times_hi"), ("ppl_times", "ppl_times_lo", "ppl_times_hi")


def measure(study: Study, bpw: float, names: Sequence[str], *, learn: bool) -> Iterator[dict[str, Any]]:
    """A row for each technique and kind of codes, the default first; a model that a technique is not for is told."""
    default: dict[str, pd.DataFrame] = {}
    for name in ["default", *(name for name in names if name != "default")]:
        (technique, settings), start = ROWS[name], time.process_time()
        try:
            made = technique(study, bpw)
        except BitallocError as error:
            if name == "default":
                raise
            print(f"{name}: {error}", flush=True)
            continue
        kinds = [] if settings else ["swept"]  # what `tune` does changes nothing before it
        for codes in kinds + ["learned"] * (learn and settings is not None):
            scores = made.study.scores(made.swept() if codes == "swept" else made.learned(**settings))
            reference = default.get("swept", scores) if name == "default" else default[codes]
            default.setdefault(codes, scores)
            row = dict(zip(KEY, (study.name, bpw, name, codes), strict=True)) | summary(scores)
            row |= dict(zip(TIMES, ratio(scores, reference), strict=True))
            row |= dict(zip(PPL_TIMES, perplexity_ratio(scores, reference), strict=True))
            yield row | {"nbytes": int(made.plan["nbytes"].sum()), "cpu_s": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2_tiny_6"], help="names of config/models.yaml, or folders")
    parser.add_argument("--corpora", nargs="+", default=[], help="in the place of the models' own")
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.6, 3.3], help="bits a weight")
    parser.add_argument("--learn", nargs="*", type=float, default=[2.6], help="budgets at which codes are learned, too")
    parser.add_argument("--techniques", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / ".peers/techniques", help="where shards are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results/techniques.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = json.loads(arguments.output.read_text())["rows"] if arguments.output.is_file() else []
    rows = {tuple(row[name] for name in KEY): row for row in before}
    try:
        for model in arguments.models:
            study = Study.of(model, arguments.corpora, arguments.work)
            for bpw in arguments.budgets:
                for row in measure(study, bpw, arguments.techniques, learn=bpw in arguments.learn):
                    place = tuple(row[name] for name in KEY)
                    rows[place] = row
                    kl, ppl = ("{:.3f} [{:.3f}, {:.3f}]".format(*map(row.get, names)) for names in (TIMES, PPL_TIMES))
                    scored = f"KL {row['kl']:.4f}, {kl}  PPL {row['ppl']:.3f}, {ppl}  {row['cpu_s']:.0f} CPU s"
                    print("{} {} {:30}{:8}".format(*place), scored, flush=True)
                    record = {"run": run_record("torch", "transformers"), "rows": list(rows.values())}
                    write_atomically(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    except BitallocError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
