"""One plan -> a packed checkpoint, models/{plan}/, and its row of CHECKPOINTS."""

from pathlib import Path

from bitalloc.compress import compress
from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, INVENTORY, PLAN, TUNED, verdicts
from bitalloc.tune import Tuned


def main(*, plan: str, inputs: dict[str, Path], settings: Config, results: Path, path_to_table: Path) -> None:
    path_to_plan = inputs["folder"] / f"{plan}.parquet"
    chosen = PLAN.read(path_to_plan)
    experiments = open_experiments(
        inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings, inputs.get("embeddings")
    )
    learned = TUNED.read(inputs["tuned"]).to_dict("records") if "tuned" in inputs else []
    frame = compress(
        {plan: chosen},
        results=results,
        experiments=experiments,
        inventory=INVENTORY.read(inputs["inventory"]),
        tuned={plan: Tuned(experiments, chosen, learned)} if learned else {},
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
