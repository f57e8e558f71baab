"""Sweep, plans and responses -> phase.parquet [tables.PHASE], controls.parquet [tables.CONTROLS] and their figure."""

from pathlib import Path

from bitalloc import figures
from bitalloc.config import Config
from bitalloc.phase import controls, phase
from bitalloc.script import stage
from bitalloc.tables import CONTROLS, GATES, INVENTORY, PHASE, PLAN, PLANS, RESPONSES, SENSITIVITY, SWEEP, as_verdicts


def main(*, model: str, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    plans, gates = PLANS.read(inputs["plans"]), GATES.read(inputs["gates"])
    drawn = {"resamples": settings.evaluate.resamples, "seed": settings.seed}
    found = phase(
        SWEEP.read(inputs["sweep"]),
        SENSITIVITY.read(inputs["sensitivity"]),
        INVENTORY.read(inputs["inventory"]),
        plans,
        signal=settings.sensitivity.signal,
        **drawn,
    )
    named = plans.loc[plans["strategy"].isin(["optimal", "bits_only", "rank_only"]), "plan"]
    frames = {name: PLAN.read(inputs["folder"] / f"{name}.parquet") for name in named}
    paired = controls(plans, RESPONSES.read(inputs["responses"]), frames, **drawn)
    verdicts = as_verdicts(gates)
    PHASE.write(found, outputs["phase"], verdicts=verdicts)
    CONTROLS.write(paired, outputs["controls"], verdicts=verdicts)
    figures.phase(found, paired, outputs["figure"], figures.stamp(gates), model=model)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(model=snakemake.wildcards.model, inputs=job.inputs, settings=job.settings, outputs=job.outputs)
