"""Errors -> the fitted laws and what every option costs by the law and by interpolation."""

from pathlib import Path

from bitalloc import fit
from bitalloc.config import Config
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import COSTS, INVENTORY, LAW, RESIDUALS, SWEEP


def main(*, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    asked, sweep, inventory = settings.fit, SWEEP.read(inputs["sweep"]), INVENTORY.read(inputs["inventory"])
    verdicts = read_verdict(inputs["verdict"])["checks"]
    law = fit.law(sweep, settings=asked, seed=settings.seed)
    LAW.write(law, outputs["law"], verdicts=verdicts)
    for name, form in (("costs_law", asked.form), ("costs_interpolation", "interpolation")):
        costs = fit.costs(sweep, inventory, law, settings=asked, stored=settings.sweep, form=form)
        COSTS.write(costs, outputs[name], verdicts=verdicts)
    RESIDUALS.write(fit.residuals(sweep, asked.form), outputs["residuals"], verdicts=verdicts)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, outputs=job.outputs)
