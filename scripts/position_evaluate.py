"""One model of a study -> RESPONSES and EVALUATE of every rule by position, and their precision maps as JSON."""

import json
from pathlib import Path

import pandas as pd

from bitalloc import precision
from bitalloc.config import Config, Study
from bitalloc.evaluate import evaluate
from bitalloc.experiments import Experiments
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store, write_atomically
from bitalloc.strategies.position import position
from bitalloc.tables import EVALUATE, INVENTORY, MOMENTS, PLAN, RESPONSES, TOKENS


def main(
    *, inputs: dict[str, Path], study: Study, settings: Config, remote_code: bool, outputs: dict[str, Path]
) -> None:
    inventory, checkpoint = INVENTORY.read(inputs["inventory"]), open_checkpoint(inputs["checkpoint"])
    known, blocks = precision.components(inventory), int(inventory["block"].max()) + 1
    outputs["folder"].mkdir(parents=True, exist_ok=True)
    plans = {}
    for rule in study.rules:
        mapping = precision.parse(position(rule, blocks, high=study.high, low=study.low), known)
        plans[rule] = precision.plan(inventory, mapping)
        PLAN.write(plans[rule], outputs["folder"] / f"{rule}.parquet")
        told = json.dumps(precision.compact(mapping), indent=1) + "\n"
        write_atomically(outputs["folder"] / f"{rule}.json", told.encode())
    store, device = Store(Path(settings.store)), pick_device(settings.device)
    scores, responses = evaluate(
        plans=plans,
        path=checkpoint.path,
        inventory=inventory,
        experiments=Experiments(
            checkpoint=checkpoint,
            inventory=inventory,
            moments=pd.DataFrame(columns=MOMENTS.names),  # these plans need none
            store=store,
            sweep=settings.sweep,
            device=device,
        ),
        tokens=TOKENS.read(inputs["tokens"]),
        items=pd.DataFrame(),
        split="report",
        settings=settings.evaluate,
        store=store,
        device=device,
        suites=["perplexity", "divergence"],
        seed=settings.seed,
        remote_code=remote_code,
        rerun=settings.evaluate.rerun,
    )
    EVALUATE.write(scores, outputs["scores"])
    RESPONSES.write(responses, outputs["responses"])


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            study=Study(**snakemake.params.study),
            settings=Config(**snakemake.params.settings),
            remote_code=snakemake.params.sheet["remote_code"],
            outputs={name: Path(path) for name, path in snakemake.output.items()},
        )
