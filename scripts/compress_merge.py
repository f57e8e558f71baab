"""One row for each checkpoint -> checkpoints.parquet [tables.CHECKPOINTS]."""

from pathlib import Path

import pandas as pd

from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, verdicts


def main(*, parts: list[Path], path_to_checkpoints: Path) -> None:
    merged = pd.concat([CHECKPOINTS.read(part) for part in parts], ignore_index=True)
    CHECKPOINTS.write(merged, path_to_checkpoints, verdicts=verdicts(parts[0]))


if __name__ == "__main__":
    with stage(snakemake):
        main(parts=[Path(path) for path in snakemake.input], path_to_checkpoints=Path(snakemake.output[0]))
