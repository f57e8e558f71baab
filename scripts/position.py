"""All models of a study -> position.parquet, criteria.parquet and position.png."""

from pathlib import Path

from bitalloc import figures, precision
from bitalloc.config import Model, Study
from bitalloc.position import Measured, criteria, damages
from bitalloc.script import stage
from bitalloc.tables import BACKENDS, CRITERIA, INVENTORY, POSITION, RESPONSES


def main(
    *,
    study: Study,
    sheets: dict[str, Model],
    skipped: dict[str, str],
    inputs: dict[str, list[Path]],
    resamples: int,
    seed: int,
    outputs: dict[str, Path],
) -> None:
    measured = []
    for name, responses, inventory, folder, backends in zip(
        sheets, *(inputs[part] for part in ("responses", "inventories", "folders", "backends")), strict=True
    ):
        tensors = INVENTORY.read(inventory)
        known = precision.components(tensors)
        maps = {rule: precision.parse(folder / f"{rule}.json", known) for rule in study.rules}
        nbytes = {rule: precision.nbytes(tensors, mapping) for rule, mapping in maps.items()}
        measured.append(Measured(name, sheets[name], RESPONSES.read(responses), nbytes, BACKENDS.read(backends)))
    draws = {"resamples": resamples, "seed": seed}
    table, verdicts = damages(study, measured, **draws), criteria(study, measured, skipped, **draws)
    POSITION.write(table, outputs["table"])
    CRITERIA.write(verdicts, outputs["criteria"])
    figures.position(table, verdicts, study, outputs["figure"])


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            study=Study(**snakemake.params.study),
            sheets={name: Model(**sheet) for name, sheet in snakemake.params.sheets.items()},
            skipped=snakemake.params.skipped,
            inputs={name: [Path(path) for path in paths] for name, paths in snakemake.input.items()},
            resamples=snakemake.params.resamples,
            seed=snakemake.params.seed,
            outputs=job.outputs,
        )
