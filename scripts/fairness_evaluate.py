"""Parallel text read under protected sets and under plans -> SENTENCES, SETS, ARMS and ANSWERS of both."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, languages
from bitalloc.budget import parse_units
from bitalloc.config import Config
from bitalloc.evaluate import evaluate
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import ANSWERS, ARMS, INVENTORY, ITEMS, PARALLEL, PLAN, PLANS, SENTENCES, SETS


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, outputs: dict[str, Path]) -> None:
    text, items, inventory = (
        PARALLEL.read(inputs["text"]),
        ITEMS.read(inputs["items_table"]),
        INVENTORY.read(inputs["inventory"]),
    )
    experiments = open_experiments(inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings)
    items = languages.asked(items, text)
    bench = languages.bench(experiments, inventory, text, settings, items=items, remote_code=remote_code)
    asked = settings.fairness
    found = languages.study(
        bench,
        bench.units.parse_budget(asked.budget),
        asked=asked.budget,
        margin=asked.margin_en,
        pairs=asked.pairs,
        seeds=asked.seeds,
        seed=settings.seed,
    )
    plans = PLANS.read(inputs["plans"])
    frames = {name: PLAN.read(inputs["folder"] / f"{name}.parquet") for name in plans["plan"]}
    parts = []
    for split in ("select", "report"):
        _, responses = evaluate(
            plans=frames,
            path=experiments.checkpoint.path,
            inventory=inventory,
            experiments=experiments,
            tokens=languages.windows(text),
            items=items,
            split=split,
            settings=settings.evaluate,
            store=experiments.store,
            device=experiments.device,
            suites=["perplexity", "world"] if len(items) and split == "report" else ["perplexity"],
            seed=settings.seed,
            remote_code=remote_code,
        )
