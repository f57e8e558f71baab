"""One row for each checkpoint -> checkpoints.parquet [tables.CHECKPOINTS]."""

from pathlib import Path

from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS

if __name__ == "__main__":
    with stage(snakemake) as job:
        CHECKPOINTS.merge([Path(part) for part in snakemake.input], job.output)
