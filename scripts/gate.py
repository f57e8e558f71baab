"""The evidence of one gate -> its verdict, gates/{gate}.json."""

from pathlib import Path

from bitalloc import gates
from bitalloc.config import Fit, Gates, Sensitivity
from bitalloc.script import stage
from bitalloc.tables import TABLES


def main(*, gate: str, evidence: dict[str, Path], settings: dict, expected: int, path_to_verdict: Path) -> None:
    tables = {name: TABLES[name].read(path) for name, path in evidence.items()}
    criteria = Gates(**settings["gates"])
    if gate == "sweep":
        probe = Sensitivity(**settings["sensitivity"])
        frame = gates.gate_sweep(**tables, gates=criteria, settings=probe, expected=expected)
    elif gate == "fit":
        frame = gates.gate_fit(**tables, gates=criteria, form=Fit(**settings["fit"]).form)
    else:
        frame = getattr(gates, f"gate_{gate}")(**tables, gates=criteria)
    gates.write_verdict(path_to_verdict, gate, frame)


if __name__ == "__main__":
    with stage(snakemake) as job:
        main(
            gate=snakemake.params.gate,
            evidence={name.removesuffix("_table"): path for name, path in job.inputs.items()},
            settings=snakemake.params.settings,
            expected=snakemake.params.get("expected", 0),
            path_to_verdict=job.output,
        )
