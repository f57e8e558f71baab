"""How well the next token is predicted: nats a token and bits a byte of every window."""

from __future__ import annotations

import math
import time
from typing import Any

import pandas as pd

from bitalloc.suites import intervals
from bitalloc.suites.scoring import Head, Responses, Scored, Windows


def responses(scored: Scored) -> Responses:
    """Per window: `nll_nats_per_token` = -1/n sum log q(token), weighing n = tokens, and `bits_per_byte` =
    n nll / (ln 2 bytes), weighing the bytes; their weighted means are those of the whole corpus.

    PPL is exp of the first mean. Bits a byte need every token but the first scored, so a stride leaves them out.
    """
    windows, scores = scored.windows, scored.scores
    rows = [windows.responses("perplexity", "nll_nats_per_token", scores["nll"], scores["tokens"])]
    if windows.whole:
        nbytes = windows.frame["nbytes"]
        bits = scores["nll"] * scores["tokens"] / math.log(2)
        rows.append(windows.responses("perplexity", "bits_per_byte", bits / nbytes, nbytes))
    return pd.concat(rows), dict.fromkeys(rows[0]["task"], f"{windows.protocol}; float32 log-softmax")


def eval_ppl(model: Any, windows: Windows, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """PPL of a causal model on the windows of one split: all that a record of it needs.

    ppl = exp(nll), nll = -1/n sum log q(token) over the n = n_tokens scored tokens; 95 % percentile bootstrap over
    windows. wall_s are the seconds of reading and scoring, tokens_per_s the tokens read in one. All but these two
    follow from model, windows and seed.
    """
    head, start = Head(model), time.perf_counter()
    scores = windows.scores(head, windows.hidden(model))
    wall_s = time.perf_counter() - start
    nll = intervals.mean(scores["nll"], scores["tokens"], windows.frame["corpus"], resamples=resamples, seed=seed)
    ends = {"": nll.value, "_lo": nll.lo, "_hi": nll.hi}
    return {
        **{f"ppl{end}": math.exp(value) for end, value in ends.items()},
        **{f"nll{end or '_nats_per_token'}": value for end, value in ends.items()},
        "n_tokens": int(scores["tokens"].sum()),
        "n_windows": len(scores),
        "wall_s": wall_s,
        "tokens_per_s": sum(batch.tokens_BT.numel() for batch in windows.batches) / wall_s,
        "protocol": f"{windows.protocol}; float32 log-softmax",
    }
