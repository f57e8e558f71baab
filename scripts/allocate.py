"""Costs and sensitivities -> plans at every budget, candidates.parquet [tables.PLANS] and one PLAN each."""

from pathlib import Path

from bitalloc.allocate import allocate
from bitalloc.config import Config
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import COSTS, EMBEDDINGS, INVENTORY, LANGUAGES, PLAN, PLANS, SENSITIVITY


def main(*, inputs: dict[str, Path], paths_to_verdicts: list[Path], settings: Config, outputs: dict[str, Path]) -> None:
    plans, frames = allocate(
        COSTS.read(inputs["costs"]),
        SENSITIVITY.read(inputs["sensitivity"]),
        INVENTORY.read(inputs["inventory"]),
        settings,
        EMBEDDINGS.read(inputs["embeddings"]) if "embeddings" in inputs else None,
        SENSITIVITY.read(inputs["leaked"]) if "leaked" in inputs else None,
        LANGUAGES.read(inputs["languages"]) if "languages" in inputs else None,
    )
    verdicts = [row for path in paths_to_verdicts for row in read_verdict(path)["checks"]]
    outputs["folder"].mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        PLAN.write(frame, outputs["folder"] / f"{name}.parquet", verdicts=verdicts)
    PLANS.write(plans, outputs["plans"], verdicts=verdicts)


if __name__ == "__main__":
    with stage(snakemake) as job:
        told = [Path(path) for path in snakemake.input.verdicts]
        main(inputs=job.inputs, paths_to_verdicts=told, settings=job.settings, outputs=job.outputs)
