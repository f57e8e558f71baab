"""AutoRound at one setting for all matrices, the largest of its presets that fits.

Recipes of its README: 200 iterations, and at 2 bits those of `auto-round-best` (1,000 iterations, all samples that
there are up to 512) with `enable_alg_ext`.
"""

from __future__ import annotations

from auto_round import AutoRound
from whole import Job, Stored, largest, linear, uniform_nbytes, work

LEAST = 32  # a matrix with a side that is no multiple of it is left alone


def rounded(job: Job, **how: object) -> None:
    """Run AutoRound, keep What and leave its checkpoint.

    It leaves matrices alone with a side that is no multiple of 32: where that takes twice the budget, it says so.
    """
    least = uniform_nbytes(job.layers, 2, 128, zeros=True, least=LEAST)
    if least > 2 * job.nbytes:
        alone = sum(any(side % LEAST for side in sides) for sides in job.layers.values())
        bits = f"{8 * least / job.weights:.1f} bits a weight at the least"
        raise SystemExit(
            f"it leaves {alone} of {len(job.layers)} matrices at 16 bits, a side no multiple of 32: {bits}"
        )
    how = {"device_map": "cpu", "seed": 42 + job.seed, "batch_size": 8} | how
    tool = AutoRound(job.model, **how)
    model, _ = tool.quantize()
    job.keep(linear(model, job.layers))
    tool.save_quantized(str(job.checkpoint), format="auto_round")


def windows(job: Job, most: int) -> dict[str, object]:
    """The calibration windows as AutoRound takes them."""
    ids_NT = job.ids()[:most]
    return {"dataset": [ids_T[None] for ids_T in ids_NT], "nsamples": len(ids_NT), "seqlen": ids_NT.shape[1]}


def quantise(job: Job) -> tuple[str, Stored | None]:
    bits, group_size = largest(job, zeros=True, least=LEAST)
    best = bits == 2
    iterations, samples = (1000, 512) if best else (200, 128)
    scheme = f"W{bits}A16" + ("" if group_size == 128 else f"G{group_size}")
    rounded(job, scheme=scheme, iters=iterations, enable_alg_ext=best, **windows(job, samples))
    return f"{scheme}, {iterations} iterations" + (", enable_alg_ext" if best else ""), None


if __name__ == "__main__":
    work("auto-round", quantise)
