"""Keys in long texts, asked of every scheme -> passkey.parquet [tables.PASSKEY]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.corpus import load_tokenizer
from bitalloc.models import context_length, read_config
from bitalloc.passkey import fitting, passkey
from bitalloc.provenance import source_digest
from bitalloc.schemes.ladder import open_bench
from bitalloc.script import stage
from bitalloc.store import digest
from bitalloc.tables import PASSKEY


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_passkey: Path) -> None:
    bench = open_bench(inputs, "report", settings, remote_code=remote_code)
    raw = read_config(bench.path)
    names, code = settings.passkey.schemes, source_digest("bitalloc.passkey")
    found = passkey(
        bench.models(names),
        load_tokenizer(bench.path),
        fitting(settings.passkey, context_length(raw)),
        bos=raw.get("bos_token_id"),
        seed=settings.seed,
        store=bench.store,
        identities={name: digest([key, code]) for name, key in bench.identities(names).items()},
        device=bench.device,
    )
    PASSKEY.write(found, path_to_passkey)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, path_to_passkey=job.output)
