"""What a unit of error in each matrix costs each language -> languages.parquet [tables.LANGUAGES]."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, languages
from bitalloc.config import Config
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.sensitivity import sensitivity
from bitalloc.tables import INVENTORY, LANGUAGES, PARALLEL


def main(*, inputs: dict[str, Path], settings: Config, path_to_languages: Path) -> None:
    text, inventory = PARALLEL.read(inputs["text"]), INVENTORY.read(inputs["inventory"])
    experiments = open_experiments(inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings)
    reference = languages.reference(experiments, inventory, text, settings)
    floor = fairness.Damage.both(reference, seed=settings.seed)[0].floor
    parts = []
    for language, rows in text[text["split"] == "select"].groupby("language", sort=False):
        own = reference[(reference["language"] == language) & (reference["split"] == "select")]
        measured = {"signals": [settings.sensitivity.signal], "windows": len(rows)}
        frame = sensitivity(
            path=experiments.checkpoint.path,
            inventory=inventory,
            experiments=experiments,
            tokens=languages.windows(rows),
            settings=settings.sensitivity.model_copy(update=measured),
            store=experiments.store,
            device=experiments.device,
            seed=settings.seed,
            split="select",
        )
        nll = own["nll_nats"].sum() / own["ntokens"].sum()
        parts.append(frame.assign(language=language, reference_nll_nats_per_token=nll, floor=language in floor))
    LANGUAGES.write(pd.concat(parts)[[column.name for column in LANGUAGES.columns]], path_to_languages)


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            settings=Config(**snakemake.params.settings),
            path_to_languages=Path(snakemake.output[0]),
        )
