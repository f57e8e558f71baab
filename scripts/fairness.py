"""Sentences under protected sets and under plans -> FAIRNESS of both, PROTECTED, SYNERGY and two figures."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, figures
from bitalloc.config import Config
from bitalloc.script import stage
from bitalloc.tables import (
    ANSWERS,
    ARMS,
    BACKENDS,
    CRITERIA,
    FAIRNESS,
    PLANS,
    PROTECTED,
    SENTENCES,
    SETS,
    SYNERGY,
    verdicts,
)


def main(*, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    arms, sets, plans = ARMS.read(inputs["arms"]), SETS.read(inputs["sets"]), PLANS.read(inputs["plans"])
    sentences, seed, stands_on = SENTENCES.read(inputs["sentences"]), settings.seed, verdicts(inputs["plans"])
    protection = fairness.fairness(sentences, sets, arms, ANSWERS.read(inputs["answers"]), seed=seed)
    planned = {name: inputs[f"plan_{name}"] for name in ("sentences", "arms", "answers")}
    read, answers = SENTENCES.read(planned["sentences"]), ANSWERS.read(planned["answers"])
    sizes = plans[["plan"]].assign(nbytes=plans["checkpoint_nbytes"])
    allocation = pd.concat(
        fairness.fairness(read, sizes, rows, answers, seed=seed)
        for _, rows in ARMS.read(planned["arms"]).groupby("budget", sort=False)
    )
    FAIRNESS.write(pd.concat([protection, allocation]), outputs["table"], verdicts=stands_on)
    select, _ = fairness.Damage.both(sentences, seed=seed)
    units, budget = fairness.Units.of(sets), arms["budget"].iloc[0]
    found = fairness.choose(select, units, int(arms["budget_nbytes"].iloc[0]), margin=settings.fairness.margin_en)
    protected = fairness.protected(select, units, found, budget)
    PROTECTED.write(protected, outputs["protected"], verdicts=stands_on)
    claims = fairness.criteria(pd.concat([protection, allocation]), BACKENDS.read(inputs["backends"]), seed=seed)
    CRITERIA.write(claims, outputs["criteria"], verdicts=stands_on)
    SYNERGY.write(fairness.synergies(select, units), outputs["synergy"], verdicts=stands_on)
    figures.fairness(protection, protected, outputs["figure"], note=fairness.conditions(sets, arms))
    figures.fairness_plans(allocation, outputs["allocation"])


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, outputs=job.outputs)
