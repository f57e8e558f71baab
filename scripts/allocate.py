"""Costs and sensitivities -> plans at every budget, candidates.parquet [tables.PLANS] and one PLAN each."""

from pathlib import Path

from bitalloc import allocate
from bitalloc.config import Config
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import COSTS, EMBEDDINGS, INVENTORY, LANGUAGES, PLAN, PLANS, SENSITIVITY


def main(
    *,
    path_to_costs: Path,
    path_to_sensitivity: Path,
    path_to_inventory: Path,
    path_to_embeddings: Path | None,
    path_to_leaked: Path | None,
    path_to_languages: Path | None,
    paths_to_verdicts: list[Path],
    settings: Config,
    path_to_plans: Path,
    folder: Path,
) -> None:
    plans, frames = allocate.allocate(
        COSTS.read(path_to_costs),
        SENSITIVITY.read(path_to_sensitivity),
        INVENTORY.read(path_to_inventory),
        settings,
        EMBEDDINGS.read(path_to_embeddings) if path_to_embeddings else None,
        SENSITIVITY.read(path_to_leaked) if path_to_leaked else None,
        LANGUAGES.read(path_to_languages) if path_to_languages else None,
    )
    verdicts = [row for path in paths_to_verdicts for row in read_verdict(path)["checks"]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        PLAN.write(frame, folder / f"{name}.parquet", verdicts=verdicts)
    PLANS.write(plans, path_to_plans, verdicts=verdicts)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            path_to_costs=Path(snakemake.input.costs),
            path_to_sensitivity=Path(snakemake.input.sensitivity),
            path_to_inventory=Path(snakemake.input.inventory),
            path_to_embeddings=Path(snakemake.input.embeddings) if snakemake.input.embeddings else None,
            path_to_leaked=Path(snakemake.input.leaked) if snakemake.input.leaked else None,
            path_to_languages=Path(snakemake.input.languages) if snakemake.input.languages else None,
            paths_to_verdicts=[Path(path) for path in snakemake.input.verdicts],
            settings=Config(**snakemake.params.settings),
            path_to_plans=Path(snakemake.output.plans),
            folder=Path(snakemake.output.folder),
        )
