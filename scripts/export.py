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
from bitalloc.tables import EXPORTS, INVENTORY, PLAN, PLANS, TABLES, verdicts


def main(
    *,
    names: dict[str, str],
    inputs: dict[str, Path],
    base: str | None,
    settings: Config,
    target: Path,
    path_to_table: Path,
) -> None:
    plans, name = PLANS.read(inputs["plans"]), names.get("format") or names["file_format"]
    source = Path(json.loads(inputs["checkpoint"].read_text())["path"])
    text = partial(
        card,
        names["model"],
        names["plan"],
        form=name,
        base=base,
        fused=settings.fuse,
        licence=licence(source / "README.md"),
        calibrated=settings.retrieve,
        plan=PLAN.read(inputs["plans_folder"] / f"{names['plan']}.parquet"),
        **{name: TABLES[name].read(inputs[name]) for name in ("plans", "evaluate", "gates")},
    )
    budget = plans.loc[plans["plan"] == names["plan"], "budget"].item()
    most = limit(budget, INVENTORY.read(inputs["inventory"]))
    row = export(
        inputs["folder"],
        target,
        name=name,
        card=lambda nbytes: text(nbytes=nbytes),
        limit=most,
        k_quants=settings.export.k_quants,
    )
    EXPORTS.write(row, path_to_table, verdicts=verdicts(inputs["plans"]))


if __name__ == "__main__":
    with stage(snakemake):
        main(
            names=dict(snakemake.wildcards.items()),
            inputs={name: Path(path) for name, path in snakemake.input.items()},
            base=snakemake.params.base,
            settings=Config(**snakemake.params.settings),
            target=Path(snakemake.output.target),
            path_to_table=Path(snakemake.output.table),
        )
