"""Candidates for `best`, and the plans of the pilot, on the select split -> select.parquet [tables.EVALUATE].

Those of the arm `leaked` likewise, on the report split and by perplexity alone.
"""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.evaluate import evaluate, sources
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.tables import EVALUATE, ITEMS, PLANS, TOKENS, verdicts

SUITES = {"select": ("perplexity", "divergence"), "report": ("perplexity",)}
ENTRANTS = {"select": r"optimal(_\d+)?|uniform|manual", "report": r"(leaked|optimal)(_\d+)?|uniform"}


def main(*, inputs: dict[str, Path], settings: Config, split: str, path_to_scores: Path) -> None:
    plans = PLANS.read(inputs["plans"])
    scores, _ = evaluate(
        plans=sources(plans.loc[plans["strategy"].str.fullmatch(ENTRANTS[split]), "plan"], inputs),
        experiments=open_experiments(inputs, settings),
        tokens=TOKENS.read(inputs["tokens"]),
        items=ITEMS.read(inputs["items_table"]).iloc[:0],
        split=split,
        settings=settings.evaluate,
        suites=SUITES[split],
        seed=settings.seed,
    )
    EVALUATE.write(scores, path_to_scores, verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, split=snakemake.params.split, path_to_scores=job.output)
