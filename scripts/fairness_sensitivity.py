"""What an error in each matrix costs each language -> languages.parquet [tables.LANGUAGES]."""

from pathlib import Path

import pandas as pd

from bitalloc import fairness, languages
from bitalloc.config import Config
from bitalloc.evaluate import evaluate
from bitalloc.experiments import open_experiments
from bitalloc.script import stage
from bitalloc.sensitivity import sensitivity
from bitalloc.tables import LANGUAGES, PARALLEL


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_languages: Path) -> None:
    text, experiments = PARALLEL.read(inputs["text"]), open_experiments(inputs, settings)
    scored = settings.evaluate.model_copy(update={"batch": languages.batch(text, settings)})
    tokens, model = languages.windows(text), experiments.inventory["model"].iloc[0]
    place = {"experiments": experiments, "seed": settings.seed, "remote_code": remote_code}
    read = []
    for split in ("select", "report"):  # the report split says which languages are at their floor
        asked = {"items": pd.DataFrame(), "split": split, "suites": ["perplexity"], "settings": scored}
        _, responses = evaluate(plans={}, tokens=tokens, **asked, **place)
        read.append(languages.of_responses(responses, text, model)[0])
    floor = fairness.Damage.both(pd.concat(read), seed=settings.seed)[0].floor
    signal, parts = settings.sensitivity.signal, []
    for language, rows in tokens[tokens["split"] == "select"].groupby("corpus", sort=False):
        measured = settings.sensitivity.model_copy(update={"signals": [signal], "windows": len(rows)})
        frame = sensitivity(tokens=rows, settings=measured, split="select", batch=scored.batch, **place)
        own = read[0][read[0]["language"] == language]
        nll = own["nll_nats"].sum() / own["ntokens"].sum()
        parts.append(frame.assign(language=language, reference_nll_nats_per_token=nll, floor=language in floor))
    LANGUAGES.write(pd.concat(parts)[LANGUAGES.names], path_to_languages)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, path_to_languages=job.output)
