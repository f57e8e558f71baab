"""Speed and memory of a model at each precision -> profile.parquet [tables.RECORDS] and the figure that shows it.

By hand: python scripts/profile_model.py --config config/runs/tiny.yaml
"""

import json
from pathlib import Path

from bitalloc import figures, records, run
from bitalloc.config import Config
from bitalloc.formats.bitalloc import source_identity
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.profile import profile
from bitalloc.script import stage
from bitalloc.suites import spread
from bitalloc.tables import INVENTORY, RECORDS, TOKENS
from bitalloc.variants import variants


def main(
    *, inputs: dict[str, Path], plans: list[Path], settings: Config, remote_code: bool, outputs: dict[str, Path]
) -> None:
    inventory, calibration = INVENTORY.read(inputs["inventory"]), None
    model = inventory["model"].iloc[0]
    asked = settings.model_dump(mode="json", include={"profile", "schemes", "device"}) | {"model": {"name": model}}
    if "tokens" in inputs:
        windows = spread(TOKENS.read(inputs["tokens"]), settings.schemes.windows)["tokens"]
        calibration = [ids.tolist() for ids in windows]
    with variants(
        settings.profile.variants,
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=inventory,
        device=pick_device(settings.device).type,
        threads=settings.threads,
        scratch=outputs["table"].parent,
        plans={plan.name: plan for plan in plans},
        remote_code=remote_code,
        schemes=settings.schemes,
        calibration=calibration,
        seed=settings.seed,
    ) as made:
        rows = profile(
            made,
            model=model,
            settings=settings.profile,
            run_id=records.run_id(asked, source_identity(inventory), settings.seed),
            revision=json.loads(inputs["checkpoint"].read_text())["revision"],
            seed=settings.seed,
        )
    RECORDS.write(records.frame(rows), outputs["table"])
    figures.profile(RECORDS.read(outputs["table"]), outputs["figure"], model=model)


if __name__ == "__main__":
    if "snakemake" not in globals():
        raise SystemExit(run.command(run.profile, __doc__))
    with stage(snakemake) as job:
        given = {"inputs": job.inputs, "settings": job.settings, "remote_code": job.remote_code, "outputs": job.outputs}
        main(plans=[Path(path) for path in snakemake.input.models], **given)
