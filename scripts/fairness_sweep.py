"""Parallel text read with layers protected, alone, in pairs and in sets -> SENTENCES, SETS, ARMS and ANSWERS.

The tables are those of `quant-fairness sweep`; `quant-fairness recommend` and `report` go on from their folder.
"""

from pathlib import Path

import pandas as pd

from bitalloc import languages
from bitalloc.config import Config
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.quant_fairness import parse_budget
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import ANSWERS, ARMS, INVENTORY, ITEMS, PARALLEL, SENTENCES, SETS


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, outputs: dict[str, Path]) -> None:
    text, inventory, asked = PARALLEL.read(inputs["text"]), INVENTORY.read(inputs["inventory"]), settings.fairness
    bench = languages.Bench(
        inventory["model"].iloc[0],
        open_checkpoint(inputs["checkpoint"]),
        inventory,
        text,
        low=languages.LOW[asked.bits],
        high=languages.HIGH[asked.protect_bits],
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
        batch=languages.batch(text, settings),
        items=languages.spoken(ITEMS.read(inputs["items_table"]), text),
        remote_code=remote_code,
    )
    told, budget = parse_budget(asked.budget or None, bench.units)
    search = {"margin": asked.margin_en, "pairs": asked.pairs, "seeds": asked.seeds, "seed": settings.seed}
    found = languages.study(bench, budget, asked=told, **search)
    SENTENCES.write(found.sentences, outputs["sentences"])
    SETS.write(found.sets, outputs["sets"])
    ARMS.write(found.arms, outputs["arms"])
    answers = pd.DataFrame(columns=ANSWERS.names)
    ANSWERS.write(answers if found.answers is None else found.answers, outputs["answers"])


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, outputs=job.outputs)
