"""All rows of EXPORTS of a model in one table."""

from pathlib import Path

import pandas as pd

from bitalloc.script import stage
from bitalloc.tables import EXPORTS, verdicts


def main(*, paths: list[Path], path: Path) -> None:
    merged = pd.concat([EXPORTS.read(part) for part in paths], ignore_index=True)
    EXPORTS.write(merged, path, verdicts=verdicts(paths[0]))


if __name__ == "__main__":
    with stage(snakemake):
        main(paths=[Path(part) for part in snakemake.input], path=Path(snakemake.output[0]))
