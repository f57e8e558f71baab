"""All INT8 and the champion as packed checkpoints, run in the backends that hold real INT8 -> BACKENDS."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from bitalloc.backends import Subject, measure
from bitalloc.compress import compress_maps
from bitalloc.config import Config
from bitalloc.formats.bitalloc import Reader
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import BACKENDS, INVENTORY, TOKENS

RUNS = {"all_low": ("native", "torchao_int8"), "champion": ("native",)}  # torchao's knows no 16 bits beside


def main(
    *, rules: list[str], inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_table: Path
) -> None:
    inventory, checkpoint = INVENTORY.read(inputs["inventory"]), open_checkpoint(inputs["checkpoint"])
    device, frames = pick_device(settings.device), []
    for plan in rules:
        with TemporaryDirectory(dir=path_to_table.parent, prefix=f".{plan}.") as folder:
            results, scratch = Path(folder), Path(folder) / "scratch"
            scratch.mkdir()
            rule = {plan: json.loads((inputs["folder"] / f"{plan}.json").read_text(encoding="utf-8"))}
            where = {"results": results, "store": Store(Path(settings.store)), "device": device}
            written = compress_maps(rule, checkpoint=checkpoint, inventory=inventory, **where)
            subject = Subject(Reader(written[plan]), checkpoint.path, scratch, device, remote_code)
            for backend in RUNS[plan]:
                frames.append(
                    measure(
                        backend,
                        plan=plan,
                        subject=subject,
                        tokens=TOKENS.read(inputs["tokens"]),
                        settings=settings.evaluate,
                        seed=settings.seed,
                        speed=True,
                    )
                )
    BACKENDS.write(pd.concat(frames) if frames else pd.DataFrame(columns=BACKENDS.names), path_to_table)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            rules=snakemake.params.rules,
            inputs=job.inputs,
            settings=job.settings,
            remote_code=job.remote_code,
            path_to_table=job.output,
        )
