"""Outcomes of all plans -> pass@1, humaneval.parquet [tables.HUMANEVAL]."""

from pathlib import Path

import pandas as pd

from bitalloc.config import Config
from bitalloc.execute import score
from bitalloc.script import stage
from bitalloc.tables import HUMANEVAL, OUTCOMES, verdicts


def main(*, paths_to_outcomes: list[Path], settings: Config, path_to_scores: Path) -> None:
    outcomes = pd.concat([OUTCOMES.read(path) for path in paths_to_outcomes], ignore_index=True)
    stamp = max(map(verdicts, paths_to_outcomes), key=len)  # the reference stands on none
    HUMANEVAL.write(score(outcomes, settings.humaneval), path_to_scores, verdicts=stamp)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            paths_to_outcomes=[Path(path) for path in snakemake.input],
            settings=job.settings,
            path_to_scores=job.output,
        )
