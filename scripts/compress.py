"""One plan -> a packed checkpoint, models/{plan}/, and its row of CHECKPOINTS."""

from pathlib import Path

from bitalloc.compress import compress
from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, PLAN, TUNED, verdicts
from bitalloc.tune import Tuned


def main(*, plan: str, inputs: dict[str, Path], settings: Config, results: Path, path_to_table: Path) -> None:
    path_to_plan = inputs["folder"] / f"{plan}.parquet"
    chosen, stamp = PLAN.read(path_to_plan), verdicts(path_to_plan)
    experiments = open_experiments(inputs, settings)
    learned = TUNED.read(inputs["tuned"]).to_dict("records") if "tuned" in inputs else []
    frame = compress(
        {plan: chosen},
        results=results,
        experiments=experiments,
        inventory=experiments.inventory,
        tuned={plan: Tuned(experiments, chosen, learned)} if learned else {},
        verdicts=stamp,
    )
    CHECKPOINTS.write(frame, path_to_table, verdicts=stamp)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            plan=snakemake.wildcards.plan,
            inputs=job.inputs,
            settings=job.settings,
            results=job.outputs["folder"].parents[1],
            path_to_table=job.outputs["table"],
        )
