"""Reference, plans that became checkpoints, and uniform, on whole texts -> protocols.parquet [tables.EVALUATE]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.evaluate import evaluate
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, EVALUATE, INVENTORY, ITEMS, PLAN, PLANS, READINGS, verdicts


def main(*, inputs: dict[str, Path], settings: Config, results: Path, path_to_scores: Path) -> None:
    plans = PLANS.read(inputs["plans"])
    written = CHECKPOINTS.read(inputs["checkpoints"]).set_index("plan")["path"]
    chosen = plans.loc[plans["plan"].isin(written.index) | (plans["strategy"] == "uniform"), "plan"]
    experiments = open_experiments(
        inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings, inputs.get("embeddings")
    )
    scores, _ = evaluate(
        plans={
            name: results / written[name] if name in written else PLAN.read(inputs["folder"] / f"{name}.parquet")
            for name in chosen
        },
        path=experiments.checkpoint.path,
        inventory=INVENTORY.read(inputs["inventory"]),
        experiments=experiments,
        tokens=READINGS.read(inputs["readings"]).assign(split="whole"),
        items=ITEMS.read(inputs["items_table"]).iloc[:0],
        split="whole",
        settings=settings.evaluate,
        store=experiments.store,
        device=experiments.device,
        suites=["protocols"],
        seed=settings.seed,
    )
    EVALUATE.write(scores, path_to_scores, verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items() if path},
            settings=Config(**snakemake.params.settings),
            results=Path(snakemake.input.checkpoints).parent,
            path_to_scores=Path(snakemake.output[0]),
        )
