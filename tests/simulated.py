"""Tables of a model that never was, with a planted relation between loss and accuracy."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from bitalloc import phase, tables
from bitalloc import success as reached

BUDGETS = {"2.6bpw": (2.6, 0.17), "2.8bpw": (2.8, 0.11), "3.3bpw": (3.3, 0.03)}  # bits a weight, uniform's excess
STRATEGIES = {"uniform": 1.0, "optimal": 0.55, "bits_only": 0.62, "rank_only": 0.9, "manual": 0.75, "greedy": 0.57}
CHANCE = 0.25
GROUPS = {"facts": ["Latin", "Hebrew", "Arabic", "Chinese"], "keys": ["0", "1", "2"]}


@dataclass
class Results:
    plans: pd.DataFrame
    evaluate: pd.DataFrame
    responses: pd.DataFrame


def empty(table: tables.Table, rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=table.names)


def simulate(
    seed: int = 0,
    *,
    slopes: dict[str, float] | None = None,
    level: dict[str, float] | None = None,
    pool: int = 20,
    items: int = 300,
    windows: int = 24,
    budgets: tuple[str, ...] = tuple(BUDGETS),
    strategies: tuple[str, ...] = tuple(STRATEGIES),
    corpora: tuple[str, ...] = ("world", "docstrings"),
    spread: float = 0.35,
) -> Results:
    """`slopes`: task -> logits of accuracy lost for each nat of excess loss; 0 = no relation at all."""
    rng = np.random.default_rng(seed)
    slopes = {"facts": 12.0, "sums": 20.0, "keys": 10.0, "passkey": 0.0} if slopes is None else slopes
    level = {"facts": 2.0, "sums": 3.0, "keys": 2.5, "passkey": 3.0} | (level or {})
    plans = _plans(rng, budgets, strategies, pool, spread)
    # the winner is a copy of the best named plan
    copies = []
    for budget in budgets:
        named = plans[(plans["budget"] == budget) & (plans["strategy"] != "random")]
        winner = named.sort_values("excess", kind="stable").iloc[0]
        copies.append(winner.to_dict() | {"plan": f"best-{budget}", "strategy": "best", "note": winner["plan"]})
    copied = {copy["plan"]: copy["note"] for copy in copies}

    responses: list[pd.DataFrame] = []
    names = ["reference", *plans["plan"]]
    excess_P = np.array([0.0, *plans["excess"]])
    for corpus, reference in zip(corpora, (1.6, 2.9), strict=False):
        window_W = rng.normal(reference, 0.2, windows)
        jitter_PW = rng.normal(0, 0.15, (len(names), windows))
        nll_PW = window_W + excess_P[:, None] * (1 + jitter_PW)
        kl_PW = np.abs(excess_P[:, None] * (0.95 + jitter_PW))
        for suite, metric, values in (
            ("perplexity", "nll_nats_per_token", nll_PW),
            ("divergence", "kl_nats_per_token", kl_PW),
            ("divergence", "top1", np.exp(-1.2 * kl_PW)),
        ):
            groups = [str(window) for window in range(windows)]
            responses.append(
                _long(names, values, groups, suite=suite, task=f"{corpus}/report", metric=metric, weight=255.0)
            )
    for task, slope in slopes.items():
        groups = [GROUPS.get(task, [""])[i % len(GROUPS.get(task, [""]))] for i in range(items)]
        ability_PI = level.get(task, 2.0) - slope * excess_P[:, None] + rng.logistic(0, 1.5, items)
        right_PI = (ability_PI + rng.logistic(0, 0.6, (len(names), items)) > 0).astype(float)
        responses.append(_long(names, right_PI, groups, suite="world", task=task, metric="acc", weight=1.0))
    frame = pd.concat(responses, ignore_index=True)
    again = [frame[frame["plan"] == note].assign(plan=plan) for plan, note in copied.items()]
    frame = pd.concat([frame, *again], ignore_index=True)
    plans = pd.concat([plans, pd.DataFrame(copies)], ignore_index=True).drop(columns="excess")
    return Results(plans, _evaluate(frame), frame)


def _plans(rng, budgets, strategies, pool, spread) -> pd.DataFrame:
    rows = []
    for budget in budgets:
        bits, excess = BUDGETS[budget]
        drawn = [(f"random-{budget}-{i:03d}", "random", float(rng.lognormal(0.05, spread))) for i in range(pool)]
        for plan, strategy, factor in [(f"{s}-{budget}", s, STRATEGIES[s]) for s in strategies] + drawn:
            nbytes = int(790_000 * bits / 8 * (1 - 0.004 * rng.random()))
            rows.append({
                "plan": plan, "strategy": strategy, "budget": budget, "budget_bytes": int(790_000 * bits / 8),
                "nbytes": nbytes, "bits_per_weight": 8 * nbytes / 790_000, "checkpoint_nbytes": nbytes + 300_000,
                "objective": excess * factor * float(rng.lognormal(0, 0.08)), "lower_bound": None, "gap": None,
                "note": "", "excess": excess * factor,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _long(names, values_PI, groups, **constant) -> pd.DataFrame:
    parts = [
        pd.DataFrame({
            "plan": name, "item": range(len(groups)), "group": groups, "value": values_I, **constant,
        })
        for name, values_I in zip(names, values_PI, strict=True)
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _evaluate(responses: pd.DataFrame) -> pd.DataFrame:
    parts = responses.groupby(["plan", "suite", "task", "metric"], sort=False)["value"]
    frame = parts.agg(value="mean", sd="std", n="size").reset_index()
    margin = 1.96 * frame.pop("sd") / np.sqrt(frame["n"])
    frame = frame.assign(lo=frame["value"] - margin, hi=frame["value"] + margin, protocol="simulated")
    frame["chance"] = np.where(frame["metric"] == "acc", CHANCE, np.nan)
    floor = frame.loc[(frame["plan"] == "reference") & (frame["lo"] <= frame["chance"]), "task"]
    frame["status"] = np.where((frame["metric"] == "acc") & frame["task"].isin(floor), "floor", "ok")
    ppl = frame[frame["metric"] == "nll_nats_per_token"].assign(metric="ppl")
    ppl = ppl.assign(**{end: np.exp(ppl[end]) for end in ("value", "lo", "hi")})
    return pd.concat([frame, ppl], ignore_index=True)[tables.EVALUATE.names]


def gates() -> pd.DataFrame:
    rows = [
        ("sweep", "completeness", 1.0, 1.0, ">=", True, "stop", "", "sweep.parquet"),
        ("sweep", "sensitivity_spread", 41.2, 3.0, ">", True, "stop", "", "sensitivity.parquet"),
        ("fit", "r2", 0.996, 0.7, ">", True, "fallback", "", "law.parquet"),
        ("fit", "r2_rank", 0.41, 0.5, ">", False, "fallback", "", "law.parquet"),
        ("pilot", "manual_gain", 0.004, 0.02, ">", False, "warn", "measured .004: manual is near uniform", "select"),
        ("downstream", "downstream", 1.3, 2.0, "<=", True, "stop", "", "evaluate.parquet"),
    ]
    return pd.DataFrame(rows, columns=tables.GATES.names)


def sweep(blocks: int = 4, seed: int = 0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    roles = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "attention",
             "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}  # fmt: skip
    for block in range(blocks):
        for role, kind in roles.items():
            scale = rng.lognormal(0, 0.5) * (1.6 if block == 0 else 1)
            for bits in (2, 3, 4):
                for group_size in (32, 64):
                    for rank in (0, 4, 8):
                        error = 2.2 * scale * 2 ** (-2.1 * bits) * (rank + 1) ** -0.25 * (group_size / 64) ** 0.3
                        nbytes = 128 * 128 * bits // 8 + 128 * 256 * 2 // group_size + rank * 260
                        rows.append({
                            "model": "simulated", "layer": f"model.layers.{block}.{role}", "block": block,
                            "role": role, "kind": kind, "site": f"{block}.in", "quantizer": "gptq", "bits": bits,
                            "group_size": group_size, "rank": rank, "nbytes": nbytes, "mse": error * 1e-3,
                            "nmse": error, "rel_error": error * rng.lognormal(0, 0.06), "weight_energy_ratio": 0.99,
                            "key": "", "wall_s": 0.0,
                        })  # fmt: skip
    return pd.DataFrame(rows)


def sensitivity(blocks: int = 4, seed: int = 0) -> pd.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    probe = sweep(blocks, seed).query("bits == 3 and rank == 0 and group_size == 64")
    for row in probe.to_dict("records"):
        kl = row["rel_error"] * rng.lognormal(-2, 1.0)
        for signal, factor in (("kl", 1.0), ("fisher", rng.lognormal(0, 0.3))):
            rows.append({
                **{k: row[k] for k in ("model", "layer", "block", "role", "kind", "rel_error")}, "signal": signal,
                "coefficient": factor * kl / row["rel_error"], "kl_nats_per_token": factor * kl,
                "lo": 0.8 * kl if signal == "kl" else np.nan, "hi": 1.25 * kl if signal == "kl" else np.nan,
            })  # fmt: skip
    return pd.DataFrame(rows)


def law() -> pd.DataFrame:
    values = {
        "additive": (0.96, 0.92, -0.88),
        "multiplicative": (0.995, 0.99, 0.73),
        "interpolation": (np.nan, 0.9995, np.nan),
    }
    rows = []
    for form, goodness in values.items():
        for statistic, value in zip(("r2_log", "r2_loo", "r2_rank"), goodness, strict=True):
            row = {"form": form, "scope": "pooled", "statistic": statistic, "value": value, "n": 28}
            rows.append({**row, "lo": value - 0.02, "hi": min(value + 0.01, 1.0)})
    return empty(tables.LAW, rows)


def residuals(seed: int = 0) -> pd.DataFrame:
    frame = sweep(seed=seed)[["layer", "block", "role", "kind", "quantizer", "bits", "group_size", "rank", "rel_error"]]
    noise = np.random.default_rng(seed).normal(0, 0.08, len(frame))
    logs = np.log(frame.pop("rel_error"))
    return frame.assign(log_error=logs, log_predicted=logs - noise, residual=noise)


def success(results: Results, goodhart: pd.DataFrame, **changes: pd.DataFrame) -> pd.DataFrame:
    frames = {"law": law(), "gates": gates()} | changes
    tables_read = (results.plans, results.evaluate, goodhart, frames["law"], frames["gates"])
    return reached.success(*tables_read, form="multiplicative")


def controls(results: Results) -> pd.DataFrame:
    frames = {plan: pd.DataFrame({"layer": [plan], "bits": [3]}) for plan in results.plans["plan"]}
    return phase.controls(results.plans, results.responses, frames, resamples=20, seed=0)
