"""Candidates for `best`, and the plans of the pilot, on the select split -> select.parquet [tables.EVALUATE].

Those of the arm `leaked` likewise, on the report split and by perplexity alone.
"""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.evaluate import evaluate
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import EVALUATE, INVENTORY, ITEMS, PLAN, PLANS, TOKENS, verdicts

SUITES = {"select": ("perplexity", "divergence"), "report": ("perplexity",)}
ENTRANTS = {"select": r"optimal(_\d+)?|uniform|manual", "report": r"(leaked|optimal)(_\d+)?|uniform"}


def main(*, inputs: dict[str, Path], settings: Config, split: str, path_to_scores: Path) -> None:
    plans = PLANS.read(inputs["plans"])
    competing = plans["strategy"].str.fullmatch(ENTRANTS[split])
    experiments = open_experiments(
        inputs["checkpoint"], inputs["inventory"], inputs["moments"], settings, inputs.get("embeddings")
    )
    scores, _ = evaluate(
        plans={name: PLAN.read(inputs["folder"] / f"{name}.parquet") for name in plans.loc[competing, "plan"]},
        path=experiments.checkpoint.path,
        inventory=INVENTORY.read(inputs["inventory"]),
        experiments=experiments,
        tokens=TOKENS.read(inputs["tokens"]),
        items=ITEMS.read(inputs["items_table"]).iloc[:0],
        split=split,
        settings=settings.evaluate,
        store=experiments.store,
        device=experiments.device,
        suites=SUITES[split],
        seed=settings.seed,
    )
    EVALUATE.write(scores, path_to_scores, verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            inputs={name: Path(path) for name, path in snakemake.input.items() if path},
            settings=Config(**snakemake.params.settings),
            split=snakemake.params.split,
            path_to_scores=Path(snakemake.output[0]),
        )
