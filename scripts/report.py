"""All tables of a model -> report.md, the page that people read."""

from pathlib import Path

from bitalloc.analyze import summary
from bitalloc.report import markdown, times
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import EVALUATE, TABLES

WANTED = {*TABLES, "protocols"}


def main(*, model: str, inputs: dict[str, Path], figures: list[str], logs: Path, path_to_report: Path) -> None:
    # `protocols` is an EVALUATE of its own
    read = {name: TABLES.get(name, EVALUATE).read(path) for name, path in inputs.items()}
    sentences = summary(read["goodhart"], read["evaluate"], read["plans"], read["gates"])
    page = markdown(model, **read, sentences=sentences, figures=figures, times=times(logs))
    write_atomically(path_to_report, page.encode())


if __name__ == "__main__":
    with stage(snakemake):
        main(
            model=snakemake.wildcards.model,
            inputs={name: Path(path) for name, path in snakemake.input.items() if path and name in WANTED},
            figures=[Path(path).name for path in snakemake.input.figures],
            logs=Path(snakemake.log[0]).parent,
            path_to_report=Path(snakemake.output[0]),
        )
