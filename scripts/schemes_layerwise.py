"""Each module of a scheme alone, and spared, on the select windows -> layerwise.parquet [tables.LAYERWISE]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.schemes.ladder import open_bench
from bitalloc.schemes.layerwise import layerwise
from bitalloc.script import stage
from bitalloc.tables import LAYERWISE


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_layerwise: Path) -> None:
    LAYERWISE.write(layerwise(open_bench(inputs, "select", settings, remote_code=remote_code)), path_to_layerwise)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, path_to_layerwise=job.output)
