"""One row for each export -> exports.parquet [tables.EXPORTS]."""

from pathlib import Path

from bitalloc.script import stage
from bitalloc.tables import EXPORTS

if __name__ == "__main__":
    with stage(snakemake) as job:
        EXPORTS.merge([Path(part) for part in snakemake.input], job.output)
