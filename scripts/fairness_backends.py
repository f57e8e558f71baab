"""The fair set and the published pattern in packed codes, run as such on the parallel text -> BACKENDS."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from bitalloc import languages
from bitalloc.backends import Subject, measure
from bitalloc.compress import compress_maps
from bitalloc.config import Config
from bitalloc.fairness import FAIR, NONE, PATTERN
from bitalloc.formats.bitalloc import Reader
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import ARMS, BACKENDS, INVENTORY, PARALLEL, SETS


def main(*, inputs: dict[str, Path], settings: Config, remote_code: bool, path_to_table: Path) -> None:
    checkpoint, inventory = open_checkpoint(inputs["checkpoint"]), INVENTORY.read(inputs["inventory"])
    arms, first = ARMS.read(inputs["arms"]).set_index("arm")["plan"], SETS.read(inputs["sets"]).iloc[0]
    device, tokens, frames = pick_device(settings.device), languages.windows(PARALLEL.read(inputs["text"])), []
    with TemporaryDirectory(dir=path_to_table.parent, prefix=".packed.") as folder:
        chosen = {arm: arms[arm].split("+") for arm in (FAIR, PATTERN) if arm in arms and arms[arm] != NONE}
        maps = {arm: languages.mapping(units, first["low"], first["high"]) for arm, units in chosen.items()}
        where = {"results": Path(folder), "store": Store(Path(settings.store)), "device": device}
        for arm, written in compress_maps(maps, checkpoint=checkpoint, inventory=inventory, **where).items():
            (scratch := Path(folder) / f"scratch-{arm}").mkdir()
            subject = Subject(Reader(written), checkpoint.path, scratch, device, remote_code)
            asked = {"settings": settings.evaluate, "seed": settings.seed}
            frames.append(measure("native", plan=arm, subject=subject, tokens=tokens, **asked))
    BACKENDS.write(pd.concat(frames) if frames else pd.DataFrame(columns=BACKENDS.names), path_to_table)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(inputs=job.inputs, settings=job.settings, remote_code=job.remote_code, path_to_table=job.output)
