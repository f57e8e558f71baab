"""Plans, scores and responses -> goodhart.parquet [tables.GOODHART] and the page that shows it."""

from pathlib import Path

from bitalloc import figures
from bitalloc.analyze import analyze, headline
from bitalloc.config import Config
from bitalloc.script import stage
from bitalloc.tables import EVALUATE, GATES, GOODHART, PLANS, RESPONSES, as_verdicts


def main(*, model: str, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    plans, evaluate, gates = PLANS.read(inputs["plans"]), EVALUATE.read(inputs["evaluate"]), GATES.read(inputs["gates"])
    responses, calibrated = RESPONSES.read(inputs["responses"]), settings.retrieve.calibrate
    goodhart = analyze(plans, evaluate, responses, settings=settings.analyze, seed=settings.seed)
    GOODHART.write(goodhart, outputs["table"], verdicts=as_verdicts(gates))
    shown = plans, evaluate, goodhart, headline(goodhart, evaluate, plans, gates), outputs["figure"]
    figures.goodhart(*shown, figures.stamp(gates), model=model, calibrated=calibrated)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(model=snakemake.wildcards.model, inputs=job.inputs, settings=job.settings, outputs=job.outputs)
