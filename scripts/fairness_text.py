"""Parallel text, built in or from files, as this model reads it -> fairness/text.parquet [tables.PARALLEL]."""

from pathlib import Path

from bitalloc import languages
from bitalloc.config import Config, expand
from bitalloc.corpus import load_tokenizer
from bitalloc.errors import BitallocError
from bitalloc.models import open_checkpoint, read_config
from bitalloc.script import stage
from bitalloc.tables import PARALLEL


def main(*, path_to_checkpoint: Path, settings: Config, path_to_text: Path) -> None:
    asked, folder = settings.fairness, open_checkpoint(path_to_checkpoint).path
    if asked.text:
        if (where := expand(asked.text)) is None:
            raise BitallocError(f"fairness.text is {asked.text}, but that environment variable is not set")
        text = languages.read(Path(where), asked.languages)
    else:
        text = languages.built_in(asked.languages)
    text = languages.tokenise(text, load_tokenizer(folder), read_config(folder))
    text = languages.split(text, sentences=asked.sentences, seed=settings.seed)
    PARALLEL.write(text[PARALLEL.names], path_to_text)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(path_to_checkpoint=job.inputs["checkpoint"], settings=job.settings, path_to_text=job.output)
