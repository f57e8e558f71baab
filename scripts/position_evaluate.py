"""One model of a study -> RESPONSES and EVALUATE of every rule by position, and their precision maps as JSON."""

import json
from pathlib import Path

import pandas as pd

from bitalloc import precision
from bitalloc.config import Config, Study
from bitalloc.evaluate import evaluate
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.strategies.position import position
from bitalloc.tables import EVALUATE, PLAN, RESPONSES, TOKENS


def main(
    *, inputs: dict[str, Path], study: Study, settings: Config, remote_code: bool, outputs: dict[str, Path]
) -> None:
    experiments = open_experiments(inputs, settings)  # without moments: these plans need none
    inventory = experiments.inventory
    known, blocks = precision.components(inventory), int(inventory["block"].max()) + 1
    outputs["folder"].mkdir(parents=True, exist_ok=True)
    plans = {}
    for rule in study.rules:
        mapping = precision.parse(position(rule, blocks, high=study.high, low=study.low), known)
        plans[rule] = precision.plan(inventory, mapping)
        PLAN.write(plans[rule], outputs["folder"] / f"{rule}.parquet")
        told = json.dumps(precision.compact(mapping), indent=1) + "\n"
        write_atomically(outputs["folder"] / f"{rule}.json", told.encode())
    scores, responses = evaluate(
        plans=plans,
        experiments=experiments,
        tokens=TOKENS.read(inputs["tokens"]),
        items=pd.DataFrame(),
        split="report",
        settings=settings.evaluate,
        suites=["perplexity", "divergence"],
        seed=settings.seed,
        remote_code=remote_code,
        rerun=settings.evaluate.rerun,
    )
    EVALUATE.write(scores, outputs["scores"])
    RESPONSES.write(responses, outputs["responses"])


if __name__ == "__main__":
    with stage(snakemake) as job:
        study, given = Study(**snakemake.params.study), {"inputs": job.inputs, "outputs": job.outputs}
        main(study=study, settings=job.settings, remote_code=job.remote_code, **given)
