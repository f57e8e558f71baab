"""Corpora and the model's tokenizer -> tokens.parquet [tables.TOKENS], items.parquet [tables.ITEMS]."""

from pathlib import Path

from bitalloc import retrieve
from bitalloc.config import Config
from bitalloc.models import open_checkpoint
from bitalloc.script import stage
from bitalloc.tables import ITEMS, TOKENS


def main(*, path_to_checkpoint: Path, settings: Config, path_to_tokens: Path, path_to_items: Path) -> None:
    folder = open_checkpoint(path_to_checkpoint).path
    TOKENS.write(retrieve.tokens(settings, folder), path_to_tokens)
    ITEMS.write(retrieve.items(settings, folder), path_to_items)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            path_to_checkpoint=job.inputs["checkpoint"],
            settings=job.settings,
            path_to_tokens=job.outputs["tokens"],
            path_to_items=job.outputs["items_table"],
        )
