"""What the evaluation of all plans would cost, and how much of it is in the store -> cost.parquet [tables.COST]."""

from pathlib import Path

from bitalloc import cost
from bitalloc.config import Config
from bitalloc.evaluate import estimate
from bitalloc.experiments import open_experiments
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, COST, INVENTORY, ITEMS, PLAN, PLANS, TOKENS, verdicts


def main(*, inputs: dict[str, Path], settings: Config, results: Path, path_to_cost: Path) -> None:
    plans = PLANS.read(inputs["plans"])
    if read_verdict(inputs["allocate"])["route"] == "near_uniform":
        plans = plans[plans["strategy"] != "random"]  # nothing to gain: the pool is not worth its hours
    written = CHECKPOINTS.read(inputs["checkpoints"]).set_index("plan")["path"]
    experiments = open_experiments(
        inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings, inputs.get("embeddings")
    )
    table = estimate(
        plans={
            name: results / written[name] if name in written else PLAN.read(inputs["folder"] / f"{name}.parquet")
            for name in plans["plan"]
        },
        path=experiments.checkpoint.path,
        inventory=INVENTORY.read(inputs["inventory"]),
        experiments=experiments,
        tokens=TOKENS.read(inputs["tokens"]),
        items=ITEMS.read(inputs["items_table"]),
        split="report",
        settings=settings.evaluate,
        store=experiments.store,
        device=experiments.device,
        seed=settings.seed,
        pool=plans.loc[plans["strategy"] == "random", "plan"].tolist(),
        rerun=settings.evaluate.rerun,
    )
    COST.write(table, path_to_cost, verdicts=verdicts(inputs["plans"]))
    print(cost.told(table))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items() if path},
            settings=Config(**snakemake.params.settings),
            results=Path(snakemake.input.checkpoints).parent,
            path_to_cost=Path(snakemake.output[0]),
        )
