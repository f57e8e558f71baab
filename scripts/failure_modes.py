"""Schemes, passkey, drift and layerwise -> failure_modes.png: how a state space fails with fewer bits."""

from pathlib import Path

from bitalloc import figures
from bitalloc.script import stage
from bitalloc.tables import TABLES


def main(*, model: str, inputs: dict[str, Path], scheme: str, path_to_figure: Path) -> None:
    tables = {name: TABLES[name].read(path) for name, path in inputs.items()}
    figures.failure_modes(tables, path_to_figure, model=model, scheme=scheme)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            model=snakemake.wildcards.model,
            inputs=job.inputs,
            scheme=snakemake.params.scheme,
            path_to_figure=job.output,
        )
