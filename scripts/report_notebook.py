"""Tables of a model -> goodhart.ipynb, executed beside them: for those who want to look closer."""

from pathlib import Path

from bitalloc.documents.notebook import execute
from bitalloc.script import stage
from bitalloc.store import write_atomically


def main(*, source: Path, path_to_notebook: Path) -> None:
    write_atomically(path_to_notebook, execute(source.read_text(), path_to_notebook.parent).encode())


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(source=job.inputs["source"], path_to_notebook=job.output)
