"""Plans, scores and responses -> goodhart.parquet [tables.GOODHART] and the page that shows it."""

from pathlib import Path

from bitalloc import figures
from bitalloc.analyze import analyze, headline
from bitalloc.config import Analyze
from bitalloc.script import stage
from bitalloc.tables import EVALUATE, GATES, GOODHART, PLANS, RESPONSES


def main(
    *,
    model: str,
    inputs: dict[str, Path],
    settings: Analyze,
    calibrated: list[str],
    seed: int,
    table: Path,
    figure: Path,
) -> None:
    plans, evaluate, gates = PLANS.read(inputs["plans"]), EVALUATE.read(inputs["evaluate"]), GATES.read(inputs["gates"])
    goodhart = analyze(
        plans,
        evaluate,
        RESPONSES.read(inputs["responses"]),
        settings=settings,
        seed=seed,
    )
    GOODHART.write(goodhart, table, verdicts=gates.astype(object).where(gates.notna(), None).to_dict("records"))
    sentence = headline(goodhart, evaluate, plans, gates)
    stamp = figures.stamp(gates)
    figures.goodhart(plans, evaluate, goodhart, sentence, figure, stamp, model=model, calibrated=calibrated)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            model=snakemake.wildcards.model,
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            settings=Analyze(**snakemake.params.settings["analyze"]),
            calibrated=snakemake.params.settings["retrieve"]["calibrate"],
            seed=snakemake.params.settings["seed"],
            table=Path(snakemake.output.table),
            figure=Path(snakemake.output.figure),
        )
