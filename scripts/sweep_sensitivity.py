"""What a unit of error in each matrix costs in KL -> sensitivity.parquet [tables.SENSITIVITY].

The arm `leaked` has a table of its own: the signal that the allocation uses, on all windows of the report split.
"""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.sensitivity import sensitivity
from bitalloc.tables import SENSITIVITY, TOKENS


def main(*, inputs: dict[str, Path], settings: Config, split: str, path_to_sensitivity: Path) -> None:
    tokens, measured = TOKENS.read(inputs["tokens"]), settings.sensitivity
    if split == "report":
        windows = int((tokens["split"] == split).sum())
        measured = measured.model_copy(update={"signals": [measured.signal], "windows": max(1, windows)})
    frame = sensitivity(
        experiments=open_experiments(inputs, settings),
        tokens=tokens,
        settings=measured,
        seed=settings.seed,
        split=split,
    )
    SENSITIVITY.write(frame, path_to_sensitivity)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, split=snakemake.params.split, path_to_sensitivity=job.output)
