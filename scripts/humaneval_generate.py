"""What one plan, or the reference, writes for HumanEval -> humaneval/{plan}.samples.parquet [tables.SAMPLES]."""

from pathlib import Path

from bitalloc.config import Config
from bitalloc.humaneval import generate
from bitalloc.models import open_checkpoint, pick_device
from bitalloc.script import stage
from bitalloc.store import Store
from bitalloc.tables import INVENTORY, SAMPLES, verdicts


def main(
    *, plan: str, inputs: dict[str, Path], plan_inputs: list[Path], settings: Config, path_to_samples: Path
) -> None:
    folder, table = plan_inputs or (None, None)
    samples = generate(
        plan=plan,
        folder=folder,
        checkpoint=open_checkpoint(inputs["checkpoint"]),
        inventory=INVENTORY.read(inputs["inventory"]),
        settings=settings.humaneval,
        store=Store(Path(settings.store)),
        device=pick_device(settings.device),
    )
    SAMPLES.write(samples, path_to_samples, verdicts=verdicts(table) if table else ())


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            plan=snakemake.wildcards.plan,
            inputs=job.inputs,
            plan_inputs=[Path(path) for path in snakemake.input.plan],
            settings=job.settings,
            path_to_samples=job.output,
        )
