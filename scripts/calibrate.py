"""Checkpoint and calibrate windows -> second moments of every site, moments.parquet [tables.MOMENTS]."""

from pathlib import Path

from bitalloc.calibrate import calibrate
from bitalloc.config import Config
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import INVENTORY, MOMENTS, TOKENS


def main(*, inputs: dict[str, Path], settings: Config, path_to_moments: Path) -> None:
    checkpoint = open_checkpoint(inputs["checkpoint"])
    moments = calibrate(
        path=checkpoint.path,
        family=checkpoint.family,
        tokens=TOKENS.read(inputs["tokens"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        settings=settings.calibrate,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
    )
    MOMENTS.write(moments, path_to_moments)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, path_to_moments=job.output)
