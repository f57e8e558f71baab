"""What the embedding and a head of its own cost at fewer bits -> embeddings.parquet [tables.EMBEDDINGS]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.embeddings import embeddings
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import EMBEDDINGS, INVENTORY, TOKENS


def main(
    *,
    path_to_checkpoint: Path,
    path_to_inventory: Path,
    path_to_tokens: Path,
    settings: Config,
    path_to_embeddings: Path,
) -> None:
    frame = embeddings(
        checkpoint=open_checkpoint(path_to_checkpoint),
        inventory=INVENTORY.read(path_to_inventory),
        tokens=TOKENS.read(path_to_tokens),
        sweep=settings.sweep,
        settings=settings.sensitivity,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
        seed=settings.seed,
    )
    EMBEDDINGS.write(frame, path_to_embeddings)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            path_to_checkpoint=Path(snakemake.input.checkpoint),
            path_to_inventory=Path(snakemake.input.inventory),
            path_to_tokens=Path(snakemake.input.tokens),
            settings=Config(**snakemake.params.settings),
            path_to_embeddings=Path(snakemake.output[0]),
        )
