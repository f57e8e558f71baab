"""Gains, law and verdicts -> success.parquet [tables.SUCCESS]: which level of what was promised is reached."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.script import stage
from bitalloc.success import success
from bitalloc.tables import EVALUATE, GATES, GOODHART, LAW, PLANS, SUCCESS, as_verdicts


def main(*, inputs: dict[str, Path], settings: Config, path_to_success: Path) -> None:
    gates = GATES.read(inputs["gates"])
    frame = success(
        PLANS.read(inputs["plans"]),
        EVALUATE.read(inputs["evaluate"]),
        GOODHART.read(inputs["goodhart"]),
        LAW.read(inputs["law"]),
        gates,
        form=settings.fit.form,
    )
    SUCCESS.write(frame, path_to_success, verdicts=as_verdicts(gates))


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, path_to_success=job.output)
