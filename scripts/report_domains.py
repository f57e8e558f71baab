"""Gains of every plan on every report corpus -> domains.png: where the damage falls."""

from pathlib import Path

from bitalloc import figures
from bitalloc.script import stage
from bitalloc.tables import CHECKPOINTS, GATES, GOODHART, PLANS


def main(*, model: str, inputs: dict[str, Path], calibrated: list[str], path_to_figure: Path) -> None:
    figures.domains(
        PLANS.read(inputs["plans"]),
        CHECKPOINTS.read(inputs["checkpoints"]),
        GOODHART.read(inputs["goodhart"]),
        calibrated,
        path_to_figure,
        figures.stamp(GATES.read(inputs["gates"])),
        model=model,
    )


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            model=snakemake.wildcards.model,
            inputs=job.inputs,
            calibrated=snakemake.params.settings["retrieve"]["calibrate"],
            path_to_figure=job.output,
        )
