"""Error of every matrix of one unit at every option -> sweep/{unit}.parquet [tables.SWEEP]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.sweep import sweep
from bitalloc.tables import INVENTORY, MOMENTS, SWEEP


def main(*, unit: str, inputs: dict[str, Path], settings: Config, path_to_errors: Path) -> None:
    checkpoint = open_checkpoint(inputs["checkpoint"])
    frame = sweep(
        unit,
        path=checkpoint.path,
        family=checkpoint.family,
        inventory=INVENTORY.read(inputs["inventory"]),
        moments=MOMENTS.read(inputs["moments"]),
        settings=settings.sweep,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
    )
    SWEEP.write(frame, path_to_errors)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(unit=snakemake.wildcards.unit, inputs=job.inputs, settings=job.settings, path_to_errors=job.output)
