"""AutoRound's AutoScheme: bits and group size of each matrix by its search, then AutoRound.

Its README: 200 iterations, and `enable_alg_ext` for SignRoundV2's results. The search takes text, so windows are
written as text; they are tokenised again, to a window that is shorter by what that loses.
"""

from __future__ import annotations

import json

from auto_round import AutoScheme
from model_autoround import LEAST, rounded
from transformers import AutoTokenizer
from whole import Job, Stored, uniform_nbytes, work

OPTIONS = [f"W{bits}A16{group}" for bits in (2, 3, 4, 8) for group in ("", "G64", "G32")]


def text(job: Job) -> dict[str, object]:
    """The calibration windows as a file of texts, with the length that nine in ten of them reach."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    texts = [tokenizer.decode(ids_T, skip_special_tokens=False) for ids_T in job.ids()]
    lengths = sorted(len(tokenizer(each.rstrip())["input_ids"]) for each in texts)
    file = job.out / "windows.json"
    file.write_text(json.dumps(texts))
    longest = min(lengths[len(lengths) // 10], job.ids().shape[1])
    return {"dataset": str(file), "nsamples": min(128, len(texts)), "seqlen": longest}


def quantise(job: Job) -> tuple[str, Stored | None]:
    # it refuses an average below what its smallest option takes, and counts the matrices that it leaves alone
    least = 8 * uniform_nbytes(job.layers, 2, 128, zeros=True, least=LEAST) / job.weights
    average = max(job.bpw, least)
    given = text(job)
    rounded(job, scheme=AutoScheme(avg_bits=average, options=OPTIONS), iters=200, enable_alg_ext=True, **given)
    return f"avg_bits {average:.3f} of {len(OPTIONS)} options, 200 iterations, enable_alg_ext", None


if __name__ == "__main__":
    work("auto-round", quantise)
