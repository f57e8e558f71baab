"""How well the next token is predicted: nats a token and bits a byte of every window."""

from __future__ import annotations

import math

import pandas as pd

from bitalloc.suites.scoring import Responses, Scored


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
