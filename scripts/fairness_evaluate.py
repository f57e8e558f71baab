"""Parallel text read under the plans -> their SENTENCES, ARMS and ANSWERS."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, languages
from bitalloc.config import Config
from bitalloc.evaluate import evaluate
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import ANSWERS, ARMS, INVENTORY, ITEMS, PARALLEL, PLAN, PLANS, SENTENCES


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, outputs: dict[str, Path]) -> None:
    text, inventory, plans = (
        PARALLEL.read(inputs["text"]),
        INVENTORY.read(inputs["inventory"]),
        PLANS.read(inputs["plans"]),
    )
    items = languages.spoken(ITEMS.read(inputs["items_table"]), text)
    scored = settings.evaluate.model_copy(update={"batch": languages.batch(text, settings)})
    experiments = open_experiments(inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings)
    frames = {name: PLAN.read(inputs["folder"] / f"{name}.parquet") for name in plans["plan"]}
    drawn = set(plans.loc[plans["strategy"] == "random", "plan"])
    named = {name: frame for name, frame in frames.items() if name not in drawn}
    random = {name: frame for name, frame in frames.items() if name in drawn}
    suites, read = ["perplexity", "world"] if len(items) else ["perplexity"], []
    for split, some, asked in (
        ("select", named, ["perplexity"]),
        ("report", named, suites),
        ("report", random, ["perplexity"]),
    ):
        _, responses = evaluate(
            plans=some,
            path=experiments.checkpoint.path,
            inventory=inventory,
            experiments=experiments,
            tokens=languages.windows(text),
            items=items,
            split=split,
            suites=asked,
            settings=scored,
            store=experiments.store,
            device=experiments.device,
            seed=settings.seed,
            remote_code=remote_code,
        )
        read.append(responses if some is not random else responses[responses["plan"] != fairness.REFERENCE])
    sentences, answers = languages.of_responses(pd.concat(read), text, inventory["model"].iloc[0])
    select, _ = fairness.Damage.both(sentences, seed=settings.seed)
    arms = [
        fairness.plan_arms(select, rows, margin=settings.fairness.margin_en)
        for _, rows in plans.groupby("budget", sort=False)
    ]
    SENTENCES.write(sentences, outputs["sentences"])
    ARMS.write(pd.concat(arms), outputs["arms"])
    ANSWERS.write(answers, outputs["answers"])


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            settings=Config(**snakemake.params.settings),
            remote_code=snakemake.params.sheet["remote_code"],
            outputs={name: Path(path) for name, path in snakemake.output.items()},
        )
