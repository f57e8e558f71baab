"""Corpora and the model's tokenizer -> readings.parquet [tables.READINGS]: whole texts for the protocols."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.models import open_checkpoint
from bitalloc.protocols import readings
from bitalloc.script import stage
from bitalloc.tables import READINGS

if __name__ == "__main__":
    with stage(snakemake):
        folder = open_checkpoint(Path(snakemake.input.checkpoint)).path
        READINGS.write(readings(Config(**snakemake.params.settings), folder), Path(snakemake.output[0]))
