"""Every scheme of weights and activations on the report windows -> schemes.parquet [tables.SCHEMES]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.schemes.ladder import ladder, open_bench
from bitalloc.script import stage
from bitalloc.tables import SCHEMES


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_schemes: Path) -> None:
    SCHEMES.write(ladder(open_bench(inputs, "report", settings, remote_code=remote_code)), path_to_schemes)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, path_to_schemes=job.output)
