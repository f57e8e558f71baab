"""Parts of the evaluation -> evaluate.parquet [tables.EVALUATE], responses.parquet [tables.RESPONSES]."""

from pathlib import Path

import pandas as pd

from bitalloc.script import stage
from bitalloc.tables import EVALUATE, RESPONSES, verdicts


def main(*, scores: list[Path], responses: list[Path], path_to_scores: Path, path_to_responses: Path) -> None:
    # every part holds the reference, which the divergence of its plans is measured against
    for table, parts, path in ((EVALUATE, scores, path_to_scores), (RESPONSES, responses, path_to_responses)):
        merged = pd.concat([table.read(part) for part in parts], ignore_index=True)
        distinct = merged.drop_duplicates(list(table.key), ignore_index=True)
        table.write(distinct, path, verdicts=verdicts(parts[0]))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            scores=[Path(path) for path in snakemake.input.scores],
            responses=[Path(path) for path in snakemake.input.responses],
            path_to_scores=Path(snakemake.output.scores),
            path_to_responses=Path(snakemake.output.responses),
        )
