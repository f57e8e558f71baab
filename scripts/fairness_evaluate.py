"""Parallel text read under the plans -> their SENTENCES, ARMS and ANSWERS."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, languages
from bitalloc.config import Config
from bitalloc.evaluate import evaluate, sources
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import ANSWERS, ARMS, ITEMS, PARALLEL, PLANS, SENTENCES


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, outputs: dict[str, Path]) -> None:
    text, plans = PARALLEL.read(inputs["text"]), PLANS.read(inputs["plans"])
    items, experiments = languages.spoken(ITEMS.read(inputs["items_table"]), text), open_experiments(inputs, settings)
    given = {
        "experiments": experiments,
        "tokens": languages.windows(text),
        "items": items,
        "settings": settings.evaluate.model_copy(update={"batch": languages.batch(text, settings)}),
        "seed": settings.seed,
        "remote_code": remote_code,
    }
    drawn = plans["strategy"] == "random"
    named, random = (sources(plans.loc[rows, "plan"], inputs) for rows in (~drawn, drawn))
    suites, alone = ["perplexity", "world"] if len(items) else ["perplexity"], ["perplexity"]
    _, select = evaluate(plans=named, split="select", suites=alone, **given)
    _, report = evaluate(plans=named, split="report", suites=suites, **given)
    _, pool = evaluate(plans=random, split="report", suites=alone, **given)
    responses = pd.concat([select, report, pool[pool["plan"] != fairness.REFERENCE]])
    sentences, answers = languages.of_responses(responses, text, experiments.inventory["model"].iloc[0])
    damage, _ = fairness.Damage.both(sentences, seed=settings.seed)
    budgets = plans.groupby("budget", sort=False)
    arms = [fairness.plan_arms(damage, rows, margin=settings.fairness.margin_en) for _, rows in budgets]
    SENTENCES.write(sentences, outputs["sentences"])
    ARMS.write(pd.concat(arms), outputs["arms"])
    ANSWERS.write(answers, outputs["answers"])


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, outputs=job.outputs)
