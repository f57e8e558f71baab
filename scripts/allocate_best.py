"""Candidates and their scores -> the best of each budget beside all others, with YAML for people."""

import shutil
from pathlib import Path

import pandas as pd

from bitalloc.allocate import choose_best, choose_leaked, tuned, write_overrides
from bitalloc.config import Config
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import EVALUATE, PLAN, PLANS, verdicts


def main(*, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    plans, stamp, folder = PLANS.read(inputs["plans"]), verdicts(inputs["plans"]), outputs["folder"]
    candidates = {name: inputs["folder"] / f"{name}.parquet" for name in plans["plan"]}
    frames = {name: PLAN.read(path) for name, path in candidates.items()}
    best, chosen = choose_best(plans, frames, EVALUATE.read(inputs["select"]))
    if "leaked" in inputs:
        leaked, found = choose_leaked(plans, frames, EVALUATE.read(inputs["leaked"]))
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
            shutil.copyfile(candidates[name], folder / f"{name}.parquet")
        if row["strategy"] != "random":
            write_atomically(folder / f"{name}.yaml", write_overrides((frames | chosen)[name], row).encode())
    PLANS.write(plans, outputs["plans"], verdicts=stamp)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, outputs=job.outputs)
