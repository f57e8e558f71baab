"""Evolution on real text -> evolution.parquet [tables.EVOLUTION], the champion's precision map, and their figure."""

import json
from pathlib import Path

from bitalloc import figures
from bitalloc.config import Config
from bitalloc.evolve import evolve
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.precision import compact
from bitalloc.script import stage
from bitalloc.store import Store, write_atomically
from bitalloc.tables import EVOLUTION, INVENTORY, TOKENS


def main(*, model: str, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    frame, champion = evolve(
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        tokens=TOKENS.read(inputs["tokens"]),
        settings=settings.evolve,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
        batch=settings.evaluate.batch,
        seed=settings.seed,
    )
    EVOLUTION.write(frame, outputs["table"])
    write_atomically(outputs["plan"], (json.dumps(compact(champion), indent=1) + "\n").encode())
    figures.evolution(frame, champion, outputs["figure"], settings.evolve, model=model)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(model=snakemake.wildcards.model, inputs=job.inputs, settings=job.settings, outputs=job.outputs)
