"""Errors -> the fitted laws and what every option costs by the law and by interpolation."""

from pathlib import Path

from bitalloc import fit
from bitalloc.config import Fit, Sweep
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import COSTS, INVENTORY, LAW, RESIDUALS, SWEEP


def main(*, inputs: dict[str, Path], outputs: dict[str, Path], settings: Fit, stored: Sweep, seed: int) -> None:
    sweep, inventory = SWEEP.read(inputs["sweep"]), INVENTORY.read(inputs["inventory"])
    verdicts = read_verdict(inputs["verdict"])["checks"]
    law = fit.law(sweep, settings=settings, seed=seed)
    LAW.write(law, outputs["law"], verdicts=verdicts)
    for name, form in (("costs_law", settings.form), ("costs_interpolation", "interpolation")):
        costs = fit.costs(sweep, inventory, law, settings=settings, stored=stored, form=form)
        COSTS.write(costs, outputs[name], verdicts=verdicts)
    RESIDUALS.write(fit.residuals(sweep, settings.form), outputs["residuals"], verdicts=verdicts)


if __name__ == "__main__":
    with stage(snakemake):
        settings = snakemake.params.settings
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            outputs={name: Path(path) for name, path in snakemake.output.items()},
            settings=Fit(**settings["fit"]),
            stored=Sweep(**settings["sweep"]),
            seed=settings["seed"],
        )
