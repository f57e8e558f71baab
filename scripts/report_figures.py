"""Sensitivities, errors and laws -> the figures of the stages before the allocation."""

from pathlib import Path

import pandas as pd

from bitalloc import figures
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import LAW, RESIDUALS, SENSITIVITY, SWEEP


def main(*, inputs: dict[str, Path], paths_to_verdicts: list[Path], form: str, outputs: dict[str, Path]) -> None:
    stamp = figures.stamp(pd.DataFrame([row for path in paths_to_verdicts for row in read_verdict(path)["checks"]]))
    figures.sensitivity(SENSITIVITY.read(inputs["sensitivity"]), outputs["sensitivity"], stamp)
    figures.errors(SWEEP.read(inputs["sweep"]), outputs["errors"], stamp)
    figures.law(RESIDUALS.read(inputs["residuals"]), LAW.read(inputs["law"]), form, outputs["law"], stamp)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            inputs=job.inputs,
            paths_to_verdicts=[Path(path) for path in snakemake.input.verdicts],
            form=snakemake.params.settings["fit"]["form"],
            outputs=job.outputs,
        )
