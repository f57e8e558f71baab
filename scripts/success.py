"""Gains, law and verdicts -> success.parquet [tables.SUCCESS]: which level of what was promised is reached."""

from pathlib import Path

from bitalloc.config import Fit
from bitalloc.script import stage
from bitalloc.success import success
from bitalloc.tables import EVALUATE, GATES, GOODHART, LAW, PLANS, SUCCESS


def main(*, inputs: dict[str, Path], settings: Fit, path_to_success: Path) -> None:
    gates = GATES.read(inputs["gates"])
    frame = success(
        PLANS.read(inputs["plans"]),
        EVALUATE.read(inputs["evaluate"]),
        GOODHART.read(inputs["goodhart"]),
        LAW.read(inputs["law"]),
        gates,
        form=settings.form,
    )
    verdicts = gates.astype(object).where(gates.notna(), None).to_dict("records")
    SUCCESS.write(frame, path_to_success, verdicts=verdicts)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            settings=Fit(**snakemake.params.settings["fit"]),
            path_to_success=Path(snakemake.output[0]),
        )
