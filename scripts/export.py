"""One checkpoint in a format of other software, with a model card, and its row of EXPORTS."""

import json
from functools import partial
from pathlib import Path

from bitalloc.budget import limit
from bitalloc.config import Config
from bitalloc.export import export
from bitalloc.formats.huggingface import licence
from bitalloc.report import card
from bitalloc.script import stage
from bitalloc.tables import EXPORTS, INVENTORY, PLAN, TABLES, verdicts


def main(
    *, names: dict[str, str], inputs: dict[str, Path], base: str | None, settings: Config, outputs: dict[str, Path]
) -> None:
    read = {name: TABLES[name].read(inputs[name]) for name in ("plans", "evaluate", "gates")}
    plan, form = names["plan"], names.get("format") or names["file_format"]
    source = Path(json.loads(inputs["checkpoint"].read_text())["path"])
    text = partial(
        card,
        names["model"],
        plan,
        form=form,
        base=base,
        fused=settings.fuse,
        licence=licence(source / "README.md"),
        calibrated=settings.retrieve,
        plan=PLAN.read(inputs["plans_folder"] / f"{plan}.parquet"),
        **read,
    )
    budget = read["plans"].set_index("plan").at[plan, "budget"]
    row = export(
        inputs["folder"],
        outputs["target"],
        name=form,
        card=lambda nbytes: text(nbytes=nbytes),
        limit=limit(budget, INVENTORY.read(inputs["inventory"])),
        k_quants=settings.export.k_quants,
    )
    EXPORTS.write(row, outputs["table"], verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake) as job:
        given = {"inputs": job.inputs, "settings": job.settings, "outputs": job.outputs}
        main(names=dict(snakemake.wildcards.items()), base=snakemake.params.base, **given)
