"""One plan in one backend -> its rows of BACKENDS."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from bitalloc.backends import Subject, measure
from bitalloc.config import Config
from bitalloc.formats.bitalloc import Reader
from bitalloc.models import pick_device
from bitalloc.script import stage
from bitalloc.tables import BACKENDS, TOKENS, verdicts


def main(
    *, backend: str, plan: str, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_table: Path
) -> None:
    with TemporaryDirectory(dir=path_to_table.parent, prefix=f".{backend}.") as scratch:
        frame = measure(
            backend,
            plan=plan,
            subject=Subject(
                reader=Reader(inputs["folder"]),
                source=Path(json.loads(inputs["checkpoint"].read_text())["path"]),
                scratch=Path(scratch),
                device=pick_device(settings.device),
                remote_code=remote_code,
            ),
            tokens=TOKENS.read(inputs["tokens"]),
            settings=settings.evaluate,
            seed=settings.seed,
        )
    BACKENDS.write(frame, path_to_table, verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            backend=snakemake.wildcards.backend,
            plan=snakemake.wildcards.plan,
            inputs=job.inputs,
            settings=job.settings,
            remote_code=job.remote_code,
            path_to_table=job.output,
        )
