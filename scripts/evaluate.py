"""One part of all plans on the report split and the tasks -> EVALUATE and RESPONSES; or what all cost -> COST."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.cost import told
from bitalloc.evaluate import estimate, evaluate
from bitalloc.experiments import open_experiments
from bitalloc.gates import read_verdict
from bitalloc.script import stage
from bitalloc.tables import (
    ASIDE,
    CHECKPOINTS,
    COST,
    EVALUATE,
    INVENTORY,
    ITEMS,
    PLAN,
    PLANS,
    RESPONSES,
    TOKENS,
    verdicts,
)


def main(*, part: int, inputs: dict[str, Path], settings: Config, results: Path, outputs: dict[str, Path]) -> None:
    plans = PLANS.read(inputs["plans"])
    if read_verdict(inputs["allocate"])["route"] == "near_uniform":
        # nothing to gain: pool and arms are not worth their hours
        plans = plans[~plans["strategy"].isin(["random", *ASIDE])]
    written = CHECKPOINTS.read(inputs["checkpoints"]).set_index("plan")["path"]
    experiments = open_experiments(
        inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings, inputs.get("embeddings")
    )
    given = {
        "plans": {
            name: results / written[name] if name in written else PLAN.read(inputs["folder"] / f"{name}.parquet")
            for name in plans["plan"]
        },
        "path": experiments.checkpoint.path,
        "inventory": INVENTORY.read(inputs["inventory"]),
        "experiments": experiments,
        "tokens": TOKENS.read(inputs["tokens"]),
        "items": ITEMS.read(inputs["items_table"]),
        "split": "report",
        "settings": settings.evaluate,
        "store": experiments.store,
        "device": experiments.device,
        "seed": settings.seed,
        "pool": plans.loc[plans["strategy"] == "random", "plan"].tolist(),
        "rerun": settings.evaluate.rerun,
    }
    if "cost" in outputs:
        table = estimate(**given)
        COST.write(table, outputs["cost"], verdicts=verdicts(inputs["plans"]))
        print(told(table))
        return
    scores, responses = evaluate(**given, part=(part, settings.evaluate.jobs))
    EVALUATE.write(scores, outputs["scores"], verdicts=verdicts(inputs["plans"]))
    RESPONSES.write(responses, outputs["responses"], verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            part=int(snakemake.wildcards.get("part", 0)),
            inputs={name: Path(path) for name, path in snakemake.input.items() if path},
            settings=Config(**snakemake.params.settings),
            results=Path(snakemake.input.checkpoints).parent,
            outputs={name: Path(path) for name, path in snakemake.output.items()},
        )
