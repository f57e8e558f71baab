"""How far a plan departs from the unquantised model on the same tokens."""

from __future__ import annotations

import pandas as pd

from bitalloc.suites.scoring import Responses, Scored


def responses(scored: Scored) -> Responses:
    """Per window: `kl_nats_per_token` = mean over tokens of sum_v p(v) log(p(v) / q(v)), p the reference's and q
    the plan's distribution of the next token over the full vocabulary; `top1` = share of tokens whose argmax
    is the same.
    """
    windows, scores = scored.windows, scored.scores
    rows = [
        windows.responses("divergence", metric, scores[score], scores["tokens"])
        for metric, score in (("kl_nats_per_token", "kl"), ("top1", "top1"))
    ]
    protocol = f"{windows.protocol}; KL(reference || plan) from float32 log-softmax over the full vocabulary"
    return pd.concat(rows), dict.fromkeys(rows[0]["task"], protocol)
