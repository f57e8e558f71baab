"""Samples of one plan, executed in the sandbox -> humaneval/{plan}.parquet [tables.OUTCOMES]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.execute import execute
from bitalloc.script import stage
from bitalloc.tables import OUTCOMES, SAMPLES, verdicts


def main(*, path_to_samples: Path, settings: Config, workers: int, path_to_outcomes: Path) -> None:
    outcomes = execute(SAMPLES.read(path_to_samples), settings.humaneval, workers=workers)
    OUTCOMES.write(outcomes, path_to_outcomes, verdicts=verdicts(path_to_samples))


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            path_to_samples=Path(snakemake.input[0]),
            settings=job.settings,
            workers=snakemake.threads,
            path_to_outcomes=job.output,
        )
