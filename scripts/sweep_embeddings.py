"""What the embedding and a head of its own cost at fewer bits -> embeddings.parquet [tables.EMBEDDINGS]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.embeddings import embeddings
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import EMBEDDINGS, INVENTORY, TOKENS


def main(*, inputs: dict[str, Path], settings: Config, path_to_embeddings: Path) -> None:
    frame = embeddings(
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        tokens=TOKENS.read(inputs["tokens"]),
        sweep=settings.sweep,
        settings=settings.sensitivity,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
        seed=settings.seed,
    )
    EMBEDDINGS.write(frame, path_to_embeddings)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, path_to_embeddings=job.output)
