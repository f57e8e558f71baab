"""All tables of a model -> paper/main.tex and the figures that it shows, ready for pdflatex."""

from pathlib import Path

from bitalloc.analyze import summary
from bitalloc.paper import paper
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import TABLES


def main(
    *, model: str, inputs: dict[str, Path], figures: list[Path], captions: list[Path], template: Path,
    authors: list[str], path_to_paper: Path,
) -> None:  # fmt: skip
    read = {name: TABLES[name].read(path) for name, path in inputs.items()}
    text = paper(
        model,
        template.read_text(),
        **read,
        sentences=summary(read["goodhart"], read["evaluate"], read["plans"], read["gates"]),
        captions={path.stem: " ".join(path.read_text().split()) for path in captions},
        authors=authors,
    )
    for path in figures:
        write_atomically(path_to_paper.parent / path.name, path.read_bytes())
    write_atomically(path_to_paper, text.encode())


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            model=snakemake.wildcards.model,
            inputs={name: path for name, path in job.inputs.items() if name in TABLES},
            figures=[Path(path) for path in snakemake.input.figures],
            captions=[Path(path) for path in snakemake.input.captions],
            template=job.inputs["template"],
            authors=snakemake.params.settings["report"]["authors"],
            path_to_paper=job.outputs["paper"],
        )
