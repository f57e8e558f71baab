"""Error of every matrix of one unit at every option -> sweep/{unit}.parquet [tables.SWEEP]."""

from pathlib import Path

from bitalloc import sweep
from bitalloc.config import Config
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import INVENTORY, MOMENTS, SWEEP


def main(
    *, unit: str, path_to_checkpoint: Path, path_to_inventory: Path, path_to_moments: Path, settings: Config, path: Path
) -> None:
    checkpoint = open_checkpoint(path_to_checkpoint)
    frame = sweep.sweep(
        unit,
        path=checkpoint.path,
        family=checkpoint.family,
        inventory=INVENTORY.read(path_to_inventory),
        moments=MOMENTS.read(path_to_moments),
        settings=settings.sweep,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
    )
    SWEEP.write(frame, path)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            unit=snakemake.wildcards.unit,
            path_to_checkpoint=Path(snakemake.input.checkpoint),
            path_to_inventory=Path(snakemake.input.inventory),
            path_to_moments=Path(snakemake.input.moments),
            settings=Config(**snakemake.params.settings),
            path=Path(snakemake.output[0]),
        )
