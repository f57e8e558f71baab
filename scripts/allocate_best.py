"""Candidates and their select scores -> the best of each budget beside all others, with YAML for people."""

import shutil
from pathlib import Path

import pandas as pd

from bitalloc.allocate import choose_best, write_overrides
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import EVALUATE, PLAN, PLANS, verdicts


def main(
    *, path_to_candidates: Path, candidates: Path, path_to_scores: Path, path_to_plans: Path, folder: Path
) -> None:
    plans, stamp = PLANS.read(path_to_candidates), verdicts(path_to_candidates)
    frames = {name: PLAN.read(candidates / f"{name}.parquet") for name in plans["plan"]}
    best, best_frames = choose_best(plans, frames, EVALUATE.read(path_to_scores))
    plans = pd.concat([best, plans], ignore_index=True)
    shutil.copytree(candidates, folder, dirs_exist_ok=True)
    for name, frame in best_frames.items():
        PLAN.write(frame, folder / f"{name}.parquet", verdicts=stamp)
    for row in plans[plans["strategy"] != "random"].to_dict("records"):
        frame = (frames | best_frames)[row["plan"]]
        write_atomically(folder / f"{row['plan']}.yaml", write_overrides(frame, row).encode())
    PLANS.write(plans, path_to_plans, verdicts=stamp)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            path_to_candidates=Path(snakemake.input.plans),
            candidates=Path(snakemake.input.folder),
            path_to_scores=Path(snakemake.input.select),
            path_to_plans=Path(snakemake.output.plans),
            folder=Path(snakemake.output.folder),
        )
