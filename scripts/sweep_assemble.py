"""All units of a sweep -> sweep.parquet [tables.SWEEP], complete or refused."""

from pathlib import Path

from bitalloc import sweep
from bitalloc.config import Sweep
from bitalloc.families import family
from bitalloc.script import stage
from bitalloc.tables import INVENTORY, SWEEP


def main(*, paths_to_units: list[Path], path_to_inventory: Path, name: str, settings: Sweep, path: Path) -> None:
    frame = sweep.assemble(
        [SWEEP.read(unit) for unit in paths_to_units],
        inventory=INVENTORY.read(path_to_inventory),
        family=family(name),
        settings=settings,
    )
    SWEEP.write(frame, path)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            paths_to_units=[Path(path) for path in snakemake.input.units],
            path_to_inventory=job.inputs["inventory"],
            name=snakemake.params.family,
            settings=Sweep(**snakemake.params.settings["sweep"]),
            path=job.output,
        )
