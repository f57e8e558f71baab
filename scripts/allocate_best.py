"""Candidates and their scores -> the best of each budget beside all others, with YAML for people."""

import shutil
from pathlib import Path

import pandas as pd

from bitalloc.allocate import choose_best, choose_leaked, tuned, write_overrides
from bitalloc.config import Config
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import EVALUATE, PLAN, PLANS, verdicts


def main(
    *,
    path_to_candidates: Path,
    candidates: Path,
    path_to_scores: Path,
    path_to_leaked: Path | None,
    settings: Config,
    path_to_plans: Path,
    folder: Path,
) -> None:
    plans, stamp = PLANS.read(path_to_candidates), verdicts(path_to_candidates)
    frames = {name: PLAN.read(candidates / f"{name}.parquet") for name in plans["plan"]}
    best, chosen = choose_best(plans, frames, EVALUATE.read(path_to_scores))
    if path_to_leaked:
        leaked, found = choose_leaked(plans, frames, EVALUATE.read(path_to_leaked))
        best, chosen = pd.concat([best, leaked], ignore_index=True), chosen | found
    plans = plans[~plans["strategy"].str.fullmatch(r"leaked_\d+")]  # of these only the winner goes on
    plans = pd.concat([best, plans], ignore_index=True)
    copies, copied = tuned(plans, frames | chosen, settings.compress.plans)
    plans, chosen = pd.concat([plans, copies], ignore_index=True), chosen | copied
    folder.mkdir(parents=True, exist_ok=True)
    for row in plans.to_dict("records"):
        name = row["plan"]
        if name in chosen:
            PLAN.write(chosen[name], folder / f"{name}.parquet", verdicts=stamp)
        else:
            shutil.copyfile(candidates / f"{name}.parquet", folder / f"{name}.parquet")
        if row["strategy"] != "random":
            write_atomically(folder / f"{name}.yaml", write_overrides((frames | chosen)[name], row).encode())
    PLANS.write(plans, path_to_plans, verdicts=stamp)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            path_to_candidates=Path(snakemake.input.plans),
            candidates=Path(snakemake.input.folder),
            path_to_scores=Path(snakemake.input.select),
            path_to_leaked=Path(snakemake.input.leaked) if snakemake.input.leaked else None,
            settings=Config(**snakemake.params.settings),
            path_to_plans=Path(snakemake.output.plans),
            folder=Path(snakemake.output.folder),
        )
