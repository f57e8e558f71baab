"""Speed and memory of a model at each precision -> profile.parquet [tables.RECORDS] and the figure that shows it."""

import json
from pathlib import Path

from bitalloc import figures, records
from bitalloc.config import Config
from bitalloc.formats.bitalloc import source_identity
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.profile import profile
from bitalloc.script import stage
from bitalloc.tables import INVENTORY, RECORDS
from bitalloc.variants import variants


def main(
    *,
    model: str,
    inputs: dict[str, Path],
    plans: list[Path],
    settings: Config,
    remote_code: bool,
    path_to_table: Path,
    path_to_figure: Path,
) -> None:
    inventory = INVENTORY.read(inputs["inventory"])
    asked = {"model": {"name": model}, "profile": settings.profile.model_dump(mode="json"), "device": settings.device}
    with variants(
        settings.profile.variants,
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=inventory,
        device=pick_device(settings.device).type,
        threads=settings.threads,
        scratch=path_to_table.parent,
        plans={plan.name: plan for plan in plans},
        remote_code=remote_code,
    ) as made:
        rows = profile(
            made,
            model=model,
            settings=settings.profile,
            run_id=records.run_id(asked, source_identity(inventory), settings.seed),
            revision=json.loads(inputs["checkpoint"].read_text())["revision"],
            seed=settings.seed,
        )
    RECORDS.write(records.frame(rows), path_to_table)
    figures.profile(RECORDS.read(path_to_table), path_to_figure, model=model)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            model=snakemake.wildcards.model,
            inputs={name: Path(snakemake.input[name]) for name in ("checkpoint", "inventory")},
            plans=[Path(path) for path in snakemake.input.models],
            settings=Config(**snakemake.params.settings),
            remote_code=snakemake.params.sheet["remote_code"],
            path_to_table=Path(snakemake.output.table),
            path_to_figure=Path(snakemake.output.figure),
        )
