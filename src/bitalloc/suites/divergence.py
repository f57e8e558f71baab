"""How far a plan departs from the unquantised model on the same tokens, in the terms of llama-perplexity.

p is the reference's distribution of the next token over the full vocabulary, q the plan's, both from float32
log-softmax (llama.cpp stores p in 16 bits, which adds an error of its own). N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from bitalloc.suites.scoring import Responses, Scored

KL, TOP1, DELTA_P, DELTA_P2, RATIO = "kl_nats_per_token", "top1", "delta_p", "delta_p_squared", "ln_ppl_ratio"
KL_PERCENTILES = (99.9, 99, 95, 90, 50, 10, 5, 1, 0.1)
DELTA_P_PERCENTILES = (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1)


def responses(scored: Scored) -> Responses:
    """Per window, means over its tokens:

    `kl_nats_per_token`: sum_v p(v) log(p(v) / q(v)); `top1`: argmax p = argmax q; `delta_p`: q(t) - p(t) of the
    token t that follows, from -1 to 1, and `delta_p_squared`, whose mean's root is `delta_p_rms`; `ln_ppl_ratio`:
    log p(t) - log q(t), whose mean is ln(PPL(plan) / PPL(reference)).
    """
    windows, tokens = scored.windows, scored.tokens
    delta_p, ratio = _delta_p(tokens), tokens["nll"].astype("float64") - tokens["nll_reference"]
    of_tokens = {KL: tokens["kl"], TOP1: tokens["top1"], DELTA_P: delta_p, DELTA_P2: delta_p**2, RATIO: ratio}
    means = windows.means(pd.DataFrame({**of_tokens, "window": tokens["window"]}))
    rows = [windows.responses("divergence", metric, means[metric], means["tokens"]) for metric in of_tokens]
    protocol = f"{windows.protocol}; KL(reference || plan) from float32 log-softmax over the full vocabulary"
    return pd.concat(rows), dict.fromkeys(rows[0]["task"], protocol)


def statistics(scored: Scored) -> pd.DataFrame:
    """task, metric, value and n (tokens) of what windows cannot be averaged for: `spread` of every corpus."""
    windows, tokens = scored.windows, scored.tokens
    task = (windows.frame["corpus"] + "/" + windows.frame["split"]).to_numpy()[tokens["window"]]
    rows = []
    for name, part in tokens.groupby(task, sort=False):
        found = spread(part["kl"], _delta_p(part), part["top1"], part["nll"], part["nll_reference"])
        rows += [(name, metric, value, len(part)) for metric, value in found.items()]
    return pd.DataFrame(rows, columns=["task", "metric", "value", "n"]).assign(suite="divergence")


def spread(
    kl_N: npt.ArrayLike,
    delta_p_N: npt.ArrayLike,
    top1_N: npt.ArrayLike,
    nll_N: npt.ArrayLike,
    nll_reference_N: npt.ArrayLike,
) -> dict[str, float]:
    """Extremes, percentiles (linear between order statistics) and standard errors, tokens taken as independent.

    `*_se` = s / sqrt(N - 1), s the deviation of the N values; of the root mean square r: half the error of
    the mean square / r; of top1, a share h: sqrt(h (1 - h) / (N - 1)). `log_prob_correlation` = cov(log q, log p) /
    (s_q s_p). Tokens of a window depend on each other: the intervals of the means, which draw whole windows,
    are the wider and safer ones.

    >>> found = spread([0.0, 0.1, 0.2, 0.3, 0.4], [0, 0, -1, 1, 0], [1, 1, 1, 1, 0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6])
    >>> [round(found[name], 4) for name in ("kl_max", "kl_p90", "kl_p50", "kl_min", "kl_se", "delta_p_se", "top1_se")]
    [0.4, 0.36, 0.2, 0.0, 0.0707, 0.3162, 0.2]
    >>> [round(found[name], 4) for name in ("ln_ppl_ratio_se", "delta_p_rms_se", "log_prob_correlation")]
    [0.2, 0.1936, 0.9864]
    """
    kl, delta_p, nll, base = (np.asarray(each, np.float64) for each in (kl_N, delta_p_N, nll_N, nll_reference_N))
    top1, rms = float(np.mean(top1_N)), math.sqrt(np.mean(delta_p**2))
    scale = nll.std() * base.std()
    return {
        **_percentiles("kl", kl, KL_PERCENTILES),
        "kl_se": _error(kl),
        **_percentiles("delta_p", delta_p, DELTA_P_PERCENTILES),
        "delta_p_se": _error(delta_p),
        "delta_p_rms_se": _error(delta_p**2) / (2 * rms) if rms else 0.0,
        "top1_se": math.sqrt(top1 * (1 - top1) / max(1, len(kl) - 1)),
        "ln_ppl_ratio_se": _error(nll - base),
        "log_prob_correlation": float(np.mean((nll - nll.mean()) * (base - base.mean())) / scale) if scale else 1.0,
    }


def _delta_p(tokens: pd.DataFrame) -> pd.Series:
    return np.exp(-tokens["nll"].astype("float64")) - np.exp(-tokens["nll_reference"].astype("float64"))


def _error(values_N: np.ndarray) -> float:
    return float(values_N.std() / math.sqrt(max(1, len(values_N) - 1)))


def _percentiles(name: str, values_N: np.ndarray, percentiles: tuple[float, ...]) -> dict[str, float]:
    found = np.percentile(values_N, percentiles)
    named = {f"{name}_p{percentile:g}": float(value) for percentile, value in zip(percentiles, found, strict=True)}
    return {f"{name}_max": float(values_N.max()), **named, f"{name}_min": float(values_N.min())}


def flips(responses: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Rows of RESPONSES for every plan but the reference, from the items' `acc`: whose answer changed.

    `flips` = right under one of the two only; `flips_to_wrong` and `flips_to_right` add up to it. Accuracy may stand
    still while they grow: Dutta et al., Accuracy is not all you need (2024, arXiv 2407.09141).

    >>> acc = {"reference": [1, 1, 0, 0], "p": [1, 0, 1, 0]}
    >>> rows = [("world", "t", "acc", i, "g", v, 1.0, plan) for plan in acc for i, v in enumerate(acc[plan])]
    >>> names = ["suite", "task", "metric", "item", "group", "value", "weight", "plan"]
    >>> flips(pd.DataFrame(rows, columns=names), "reference").groupby("metric")["value"].mean().to_dict()
    {'flips': 0.5, 'flips_to_right': 0.25, 'flips_to_wrong': 0.25}
    """
    acc = responses[responses["metric"] == "acc"]
    place = ["suite", "task", "item"]
    own = acc[acc["plan"] == reference][[*place, "value"]]
    both = acc[acc["plan"] != reference].merge(own, on=place, suffixes=("", "_before"))
    change = both["value"] - both.pop("value_before")
    values: Mapping[str, pd.Series] = {
        "flips": change.abs(),
        "flips_to_wrong": (change < 0).astype(float),
        "flips_to_right": (change > 0).astype(float),
    }
    return pd.concat([both.assign(metric=metric, value=value) for metric, value in values.items()])
