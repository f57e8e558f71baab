"""Rows of all tuned plans -> tune.parquet [tables.TUNED]."""

from pathlib import Path

from bitalloc.script import stage
from bitalloc.tables import TUNED

if __name__ == "__main__":
    with stage(snakemake) as job:
        TUNED.merge([Path(part) for part in snakemake.input], job.output)
