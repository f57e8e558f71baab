"""All tables of a model -> report.md and report.html, the pages that people read."""

from pathlib import Path

from bitalloc.analyze import summary
from bitalloc.documents import html, markdown
from bitalloc.report import page, times
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import EVALUATE, TABLES

WANTED = {*TABLES, "protocols"}


def main(
    *, model: str, inputs: dict[str, Path], figures: list[Path], captions: list[Path], template: Path, logs: Path,
    outputs: dict[str, Path],
) -> None:  # fmt: skip
    # `protocols` is an EVALUATE of its own
    read = {name: TABLES.get(name, EVALUATE).read(path) for name, path in inputs.items()}
    told = {
        **read,
        "sentences": summary(read["goodhart"], read["evaluate"], read["plans"], read["gates"]),
        "captions": {path.stem: " ".join(path.read_text().split()) for path in captions},
        "figures": figures,
        "times": times(logs),
    }
    write_atomically(outputs["markdown"], markdown.render(page(model, **told)).encode())
    write_atomically(outputs["html"], html.render(page(model, **told, long=True), template.read_text()).encode())


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            model=snakemake.wildcards.model,
            inputs={name: path for name, path in job.inputs.items() if name in WANTED},
            figures=[Path(path) for path in snakemake.input.figures],
            captions=[Path(path) for path in snakemake.input.captions],
            template=job.inputs["template"],
            logs=Path(snakemake.log[0]).parent,
            outputs=job.outputs,
        )
