"""One part of all plans on the report split and the tasks -> EVALUATE and RESPONSES; or what all cost -> COST."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.cost import told
from bitalloc.evaluate import estimate, evaluate, sources
from bitalloc.experiments import open_experiments
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import ASIDE, COST, EVALUATE, ITEMS, PLANS, RESPONSES, TOKENS, verdicts


def main(*, part: int, inputs: dict[str, Path], settings: Config, outputs: dict[str, Path]) -> None:
    plans, stamp = PLANS.read(inputs["plans"]), verdicts(inputs["plans"])
    if read_verdict(inputs["allocate"])["route"] == "near_uniform":
        # nothing to gain: pool and arms are not worth their hours
        plans = plans[~plans["strategy"].isin(["random", *ASIDE])]
    given = {
        "plans": sources(plans["plan"], inputs),
        "experiments": open_experiments(inputs, settings),
        "tokens": TOKENS.read(inputs["tokens"]),
        "items": ITEMS.read(inputs["items_table"]),
        "split": "report",
        "settings": settings.evaluate,
        "seed": settings.seed,
        "pool": plans.loc[plans["strategy"] == "random", "plan"].tolist(),
        "rerun": settings.evaluate.rerun,
    }
    if "cost" in outputs:
        table = estimate(**given)
        COST.write(table, outputs["cost"], verdicts=stamp)
        print(told(table))
        return
    scores, responses = evaluate(**given, part=(part, settings.evaluate.jobs))
    EVALUATE.write(scores, outputs["scores"], verdicts=stamp)
    RESPONSES.write(responses, outputs["responses"], verdicts=stamp)


if __name__ == "__main__":
    with stage(snakemake) as job:
        part = int(snakemake.wildcards.get("part", 0))
        main(part=part, inputs=job.inputs, settings=job.settings, outputs=job.outputs)
