"""Reference, plans that became checkpoints, and uniform, on whole texts -> protocols.parquet [tables.EVALUATE]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.evaluate import evaluate, sources
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, EVALUATE, ITEMS, PLANS, READINGS, verdicts


def main(*, inputs: dict[str, Path], settings: Config, path_to_scores: Path) -> None:
    plans, written = PLANS.read(inputs["plans"]), CHECKPOINTS.read(inputs["checkpoints"])["plan"]
    scores, _ = evaluate(
        plans=sources(plans.loc[plans["plan"].isin(written) | (plans["strategy"] == "uniform"), "plan"], inputs),
        experiments=open_experiments(inputs, settings),
        tokens=READINGS.read(inputs["readings"]).assign(split="whole"),
        items=ITEMS.read(inputs["items_table"]).iloc[:0],
        split="whole",
        settings=settings.evaluate,
        suites=["protocols"],
        seed=settings.seed,
    )
    EVALUATE.write(scores, path_to_scores, verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, path_to_scores=job.output)
