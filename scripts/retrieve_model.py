"""Model sheet -> checkpoint.json (where the weights lie) and inventory.parquet [tables.INVENTORY]."""

import json
from pathlib import Path

from bitalloc import retrieve
from bitalloc.config import Model
from bitalloc.families import family
from bitalloc.script import stage
from bitalloc.store import write_atomically
from bitalloc.tables import INVENTORY


def main(*, name: str, sheet: Model, path_to_checkpoint: Path, path_to_inventory: Path) -> None:
    folder, revision = retrieve.resolve(name, sheet)
    INVENTORY.write(retrieve.inventory(name, folder, family(sheet.family)), path_to_inventory)
    where = {"path": str(folder), "hub": sheet.hub, "revision": revision, "family": sheet.family}
    write_atomically(path_to_checkpoint, json.dumps(where, indent=1).encode())


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            name=snakemake.wildcards.model,
            sheet=Model(**snakemake.params.sheet),
            path_to_checkpoint=job.outputs["checkpoint"],
            path_to_inventory=job.outputs["inventory"],
        )
