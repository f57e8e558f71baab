"""A plan of bitalloc's without rank, rounded by AutoRound with the recipe of model_autoscheme.py."""

from __future__ import annotations

from model_autoround import rounded, windows
from whole import Job, Stored, work


def quantise(job: Job) -> tuple[str, Stored | None]:
    settings = {"data_type": "int", "sym": True, "act_bits": 16}
    layers = {name: settings | option for name, option in job.plan.items()}
    rounded(job, scheme="W4A16", layer_config=layers, iters=200, enable_alg_ext=True, **windows(job, 128))
    return "bits_only's options, 200 iterations, enable_alg_ext", None


if __name__ == "__main__":
    work("auto-round", quantise)
