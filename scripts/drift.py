"""The recurrent state under every scheme against that of the model as it is -> drift.parquet [tables.DRIFT]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.drift import drift, sequences
from bitalloc.provenance import source_digest
from bitalloc.schemes.ladder import open_bench
from bitalloc.script import stage
from bitalloc.store import digest
from bitalloc.tables import DRIFT, TOKENS


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_drift: Path) -> None:
    bench = open_bench(inputs, "report", settings, remote_code=remote_code)
    names, code = settings.drift.schemes, source_digest("bitalloc.drift")
    found = drift(
        bench.models(names),
        sequences(TOKENS.read(inputs["tokens"]), settings.drift),
        settings.drift,
        resamples=settings.evaluate.resamples,
        seed=settings.seed,
        store=bench.store,
        identities={name: digest([key, code]) for name, key in bench.identities(names).items()},
        device=bench.device,
    )
    DRIFT.write(found, path_to_drift)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, path_to_drift=job.output)
