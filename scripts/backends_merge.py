"""Every plan in every backend -> backends.parquet [tables.BACKENDS] and the figure that shows it."""

from pathlib import Path

import pandas as pd

from bitalloc import figures
from bitalloc.script import stage
from bitalloc.tables import BACKENDS, GATES, verdicts


def main(*, model: str, parts: list[Path], path_to_table: Path, path_to_figure: Path) -> None:
    BACKENDS.merge(parts, path_to_table)
    gates = pd.DataFrame(verdicts(path_to_table), columns=GATES.names)
    figures.backends(BACKENDS.read(path_to_table), path_to_figure, figures.stamp(gates), model=model)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            model=snakemake.wildcards.model,
            parts=[Path(part) for part in snakemake.input],
            path_to_table=job.outputs["table"],
            path_to_figure=job.outputs["figure"],
        )
