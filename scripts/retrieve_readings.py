"""Corpora and the model's tokenizer -> readings.parquet [tables.READINGS]: whole texts for the protocols."""

from bitalloc.models import open_checkpoint
from bitalloc.protocols import readings
from bitalloc.script import stage
from bitalloc.tables import READINGS

if __name__ == "__main__":
    with stage(snakemake) as job:
        folder = open_checkpoint(job.inputs["checkpoint"]).path
        READINGS.write(readings(job.settings, folder), job.output)
