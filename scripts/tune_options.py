"""A draw of blocks and options, learned -> tune_options.parquet [tables.TUNED_OPTIONS] and tune.png."""

from pathlib import Path

import pandas as pd

from bitalloc import figures
from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import INVENTORY, SWEEP, TOKENS, TUNED_OPTIONS
from bitalloc.tune import options


def main(*, model: str, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    verdict = read_verdict(inputs["verdict"])["checks"]
    frame = options(
        sweep=SWEEP.read(inputs["sweep"]),
        tokens=TOKENS.read(inputs["tokens"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        experiments=open_experiments(inputs, settings),
        settings=settings.tune,
        seed=settings.seed,
    )
    TUNED_OPTIONS.write(frame, outputs["table"], verdicts=verdict)
    figures.tune(frame, outputs["figure"], figures.stamp(pd.DataFrame(verdict)), model=model, seed=settings.seed)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(model=snakemake.wildcards.model, inputs=job.inputs, settings=job.settings, outputs=job.outputs)
