"""Perplexity of whole texts, by the convention that each window was cut for (`bitalloc.protocols`)."""

from __future__ import annotations

import math

import pandas as pd

from bitalloc.errors import BitallocError
from bitalloc.suites.scoring import Responses, Scored


def responses(scored: Scored) -> Responses:
    """Per window, under `lm-eval` per document, from its summed nats L = -sum log q(token):

    `nll_nats_per_token` = L / tokens and `bits_per_byte` = L / (ln 2 bytes), each weighed by what it is divided by;
    under `lm-eval` also `nats_per_word` = L / words and `nats_per_byte`, whose weighted means m give its
    word_perplexity and byte_perplexity, exp(m). The task is <corpus>/<protocol>.
    """
    frame = scored.windows.frame
    if "protocol" not in frame:
        raise BitallocError("the suite protocols reads whole texts: name them in evaluate.protocols, not in suites")
    tokens = scored.scores["tokens"]
    place = ["corpus", "protocol", "document"]
    sums = (
        frame[[*place, "nbytes", "words", "how"]]
        .assign(tokens=tokens, nats=scored.scores["nll"] * tokens)
        .groupby(place, sort=False)
        .agg({"nats": "sum", "tokens": "sum", "nbytes": "sum", "words": "sum", "how": "first"})
        .reset_index()
    )
    rolling = sums[sums["protocol"] == "lm-eval"]
    rows = [
        _rows(sums, "nll_nats_per_token", "tokens"),
        _rows(sums, "bits_per_byte", "nbytes", math.log(2)),
        _rows(rolling, "nats_per_word", "words"),
        _rows(rolling, "nats_per_byte", "nbytes"),
    ]
    how = dict(zip(_task(sums), sums["how"] + "; float32 log-softmax", strict=True))
    return pd.concat(rows, ignore_index=True), how


def _task(sums: pd.DataFrame) -> pd.Series:
    return sums["corpus"] + "/" + sums["protocol"]


def _rows(sums: pd.DataFrame, metric: str, unit: str, scale: float = 1.0) -> pd.DataFrame:
    weight = sums[unit].astype("float64")
    return pd.DataFrame(
        {
            "suite": "protocols",
            "task": _task(sums),
            "metric": metric,
            "item": sums["document"].astype("int64"),
            "group": sums["corpus"],
            "value": sums["nats"] / (scale * weight),
            "weight": weight,
        }
    )
