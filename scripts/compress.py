"""One plan -> a packed checkpoint, models/{plan}/, and its row of CHECKPOINTS."""

from pathlib import Path

from bitalloc.compress import compress
from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, INVENTORY, PLAN, verdicts


def main(*, plan: str, inputs: dict[str, Path], settings: Config, results: Path, path_to_table: Path) -> None:
    path_to_plan = inputs["folder"] / f"{plan}.parquet"
    frame = compress(
        {plan: PLAN.read(path_to_plan)},
        results=results,
        experiments=open_experiments(
            inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings, inputs.get("embeddings")
        ),
        inventory=INVENTORY.read(inputs["inventory"]),
        verdicts=verdicts(path_to_plan),
    )
    CHECKPOINTS.write(frame, path_to_table, verdicts=verdicts(path_to_plan))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            plan=snakemake.wildcards.plan,
            inputs={name: Path(path) for name, path in snakemake.input.items() if path},
            settings=Config(**snakemake.params.settings),
            results=Path(snakemake.output.folder).parents[1],
            path_to_table=Path(snakemake.output.table),
        )
