"""Verdicts of all gates -> gates.parquet [tables.GATES]."""

from pathlib import Path

import pandas as pd

from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import GATES


def main(*, paths_to_verdicts: list[Path], path_to_gates: Path) -> None:
    rows = [row for path in paths_to_verdicts for row in read_verdict(path)["checks"]]
    GATES.write(pd.DataFrame(rows, columns=GATES.names), path_to_gates)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(paths_to_verdicts=[Path(path) for path in snakemake.input], path_to_gates=job.output)
