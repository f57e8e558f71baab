"""What a unit of error in each matrix costs in KL -> sensitivity.parquet [tables.SENSITIVITY].

The arm `leaked` has a table of its own: the signal that the allocation uses, on all windows of the report split.
"""

from pathlib import Path

from bitalloc import sensitivity
from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import INVENTORY, SENSITIVITY, TOKENS


def main(
    *,
    path_to_checkpoint: Path,
    path_to_inventory: Path,
    path_to_moments: Path,
    path_to_tokens: Path,
    settings: Config,
    split: str,
    path_to_sensitivity: Path,
) -> None:
    tokens, measured = TOKENS.read(path_to_tokens), settings.sensitivity
    if split == "report":
        windows = int((tokens["split"] == split).sum())
        measured = measured.model_copy(update={"signals": [measured.signal], "windows": max(1, windows)})
    experiments = open_experiments(path_to_checkpoint, path_to_inventory, path_to_moments, settings)
    frame = sensitivity.sensitivity(
        path=experiments.checkpoint.path,
        inventory=INVENTORY.read(path_to_inventory),
        experiments=experiments,
        tokens=tokens,
        settings=measured,
        store=experiments.store,
        device=experiments.device,
        seed=settings.seed,
        split=split,
    )
    SENSITIVITY.write(frame, path_to_sensitivity)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            path_to_checkpoint=Path(snakemake.input.checkpoint),
            path_to_inventory=Path(snakemake.input.inventory),
            path_to_moments=Path(snakemake.input.moments),
            path_to_tokens=Path(snakemake.input.tokens),
            settings=Config(**snakemake.params.settings),
            split=snakemake.params.split,
            path_to_sensitivity=Path(snakemake.output[0]),
        )
