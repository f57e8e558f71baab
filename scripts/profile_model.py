"""Speed and memory of a model at each precision -> profile.parquet [tables.RECORDS] and the figure that shows it.

By hand: python scripts/profile_model.py --config config/runs/tiny.yaml
"""

import json
import sys
from pathlib import Path

from bitalloc import figures, records, run
from bitalloc.config import Config
from bitalloc.formats.bitalloc import source_identity
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.profile import profile
from bitalloc.script import stage
from bitalloc.suites import spread
from bitalloc.tables import INVENTORY, RECORDS, TOKENS
from bitalloc.variants import variants


def main(
    *,
    model: str,
    inputs: dict[str, Path],
    plans: list[Path],
    path_to_tokens: Path | None,
    settings: Config,
    remote_code: bool,
    path_to_table: Path,
    path_to_figure: Path,
) -> None:
    inventory = INVENTORY.read(inputs["inventory"])
    asked = settings.model_dump(mode="json", include={"profile", "schemes", "device"}) | {"model": {"name": model}}
    calibration = None
    if path_to_tokens:
        windows = spread(TOKENS.read(path_to_tokens), settings.schemes.windows)["tokens"]
        calibration = [ids.tolist() for ids in windows]
    with variants(
        settings.profile.variants,
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=inventory,
        device=pick_device(settings.device).type,
        threads=settings.threads,
        scratch=path_to_table.parent,
        plans={plan.name: plan for plan in plans},
        remote_code=remote_code,
        schemes=settings.schemes,
        calibration=calibration,
        seed=settings.seed,
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


if __name__ == "__main__" and "snakemake" not in globals():
    sys.exit(run.command(run.profile, __doc__))

if __name__ == "__main__":
    with stage(snakemake):
        main(
            model=snakemake.wildcards.model,
            inputs={name: Path(snakemake.input[name]) for name in ("checkpoint", "inventory")},
            plans=[Path(path) for path in snakemake.input.models],
            path_to_tokens=Path(snakemake.input.tokens) if snakemake.input.tokens else None,
            settings=Config(**snakemake.params.settings),
            remote_code=snakemake.params.sheet["remote_code"],
            path_to_table=Path(snakemake.output.table),
            path_to_figure=Path(snakemake.output.figure),
        )
