"""Parts of the evaluation -> evaluate.parquet [tables.EVALUATE], responses.parquet [tables.RESPONSES]."""

from pathlib import Path

from bitalloc.script import stage
from bitalloc.tables import EVALUATE, RESPONSES

if __name__ == "__main__":
    with stage(snakemake) as job:
        # every part holds the reference, which the divergence of its plans is measured against
        EVALUATE.merge([Path(part) for part in snakemake.input.scores], job.outputs["scores"])
        RESPONSES.merge([Path(part) for part in snakemake.input.responses], job.outputs["responses"])
