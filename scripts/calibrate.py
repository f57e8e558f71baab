"""Checkpoint and calibrate windows -> second moments of every site, moments.parquet [tables.MOMENTS]."""

from pathlib import Path

from bitalloc import calibrate
from bitalloc.config import Config
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import INVENTORY, MOMENTS, TOKENS


def main(
    *, path_to_checkpoint: Path, path_to_inventory: Path, path_to_tokens: Path, settings: Config, path_to_moments: Path
) -> None:
    checkpoint = open_checkpoint(path_to_checkpoint)
    moments = calibrate.calibrate(
        path=checkpoint.path,
        family=checkpoint.family,
        tokens=TOKENS.read(path_to_tokens),
        inventory=INVENTORY.read(path_to_inventory),
        settings=settings.calibrate,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
    )
    MOMENTS.write(moments, path_to_moments)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            path_to_checkpoint=Path(snakemake.input.checkpoint),
            path_to_inventory=Path(snakemake.input.inventory),
            path_to_tokens=Path(snakemake.input.tokens),
            settings=Config(**snakemake.params.settings),
            path_to_moments=Path(snakemake.output[0]),
        )
