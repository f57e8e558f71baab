"""One plan -> its codes learned, in the store, and what that brought, tune/{plan}.parquet [tables.TUNED]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import INVENTORY, PLAN, TOKENS, TUNED, verdicts
from bitalloc.tune import tune


def main(*, plan: str, inputs: dict[str, Path], settings: Config, path_to_table: Path) -> None:
    path_to_plan = inputs["folder"] / f"{plan}.parquet"
    frame = tune(
        name=plan,
        plan=PLAN.read(path_to_plan),
        tokens=TOKENS.read(inputs["tokens"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        experiments=open_experiments(inputs, settings),
        settings=settings.tune,
        seed=settings.seed,
    )
    TUNED.write(frame, path_to_table, verdicts=verdicts(path_to_plan))


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(plan=snakemake.wildcards.plan, inputs=job.inputs, settings=job.settings, path_to_table=job.output)
