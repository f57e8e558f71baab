"""GO/NO-GO: each gate holds the evidence of a stage against the criteria of `config.Gates` -> a GATES frame.

A check's mode says what a NO-GO does: `stop` halts the branch, `warn` only stamps what follows, `fallback` goes
on by another route. Evidence that is missing or not a number is a NO-GO. The verdict of a gate is a small JSON
file, so that whoever routes on it (`read_verdict`, `message`) needs nothing but the standard library:
pandas is imported where frames are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitalloc.errors import BitallocError
from bitalloc.store import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from bitalloc.config import Gates, Sensitivity

ROUTES = {"fit": ("law", "interpolation"), "allocate": ("optimal", "near_uniform")}  # gate -> (route, fallback)
STEEP_BPW = (2.4, 2.7)  # bits a weight where allocation has something to win: the pilot's budget
PILOT_GAIN = 0.05  # share of PPL that passes for the pilot whatever was recovered
_COMPARISONS = {
    "completeness": ">=",
    "optimal_recovery": ">=",
    "predicted_bytes": "<=",
    "downstream": "<=",
    "languages": ">=",
}
_REFUSED = {">": "<=", ">=": "<", "<=": ">"}


# ---------------------------------------------------------------------------------------------- the gates


def gate_sweep(
    *, sweep: pd.DataFrame, sensitivity: pd.DataFrame, gates: Gates, settings: Sensitivity, expected: int
) -> pd.DataFrame:
    """Is the sweep complete, and is there anything to allocate by?

    completeness = experiments with a finite error / `expected`; sensitivity_spread = largest / smallest positive
    coefficient of the signal in use; error_range = median over matrices of largest / smallest rel_error, quantised
    options only; layer_spread = largest / smallest rel_error of a matrix at the probe option (`probe_bits`, rank 0,
    mean over quantisers and group sizes).
    """
    coefficient = sensitivity.loc[sensitivity["signal"] == settings.signal, "coefficient"]
    quantised = sweep[sweep["bits"] < 16]
    by_matrix = quantised.groupby("layer")["rel_error"]
    probe = quantised[(quantised["bits"] == settings.probe_bits) & (quantised["rank"] == 0)]
    finite = sweep["rel_error"].map(math.isfinite).sum()
    # where NaN is among the evidence, `min` and `max` would pass over it
    sound = coefficient.notna().all()
    return _frame(
        gates,
        "sweep",
        completeness=(finite / expected if expected else None, "sweep.parquet"),
        sensitivity_spread=(_spread(coefficient[coefficient > 0]) if sound else None, "sensitivity.parquet"),
        error_range=((by_matrix.max() / by_matrix.min()).median(), "sweep.parquet"),
        layer_spread=(_spread(probe.groupby("layer")["rel_error"].mean()), "sweep.parquet"),
    )


def gate_fit(*, law: pd.DataFrame, gates: Gates, form: str) -> pd.DataFrame:
    """Does the law of `form` hold: pooled, for options and ranks it has not seen, and on both kinds of matrix?

    beta and the decay with rank (delta, or kappa of the exponential law) are the lower ends of their intervals. A kind
    of matrix that the model has not, as in Mamba2, is not asked for.
    """
    kinds = set(law["scope"]) if len(law) else {"attention", "mlp"}
    found = law.set_index(["form", "scope", "statistic"])

    def read(statistic: str, *, scope: str = "pooled", of: str = form, column: str = "value") -> tuple[Any, str]:
        place = (of, scope, statistic)
        return (found.loc[place, column] if place in found.index else None), "law.parquet"

    return _frame(
        gates,
        "fit",
        r2=read("r2_log"),
        r2_leave_one_out=read("r2_loo"),
        r2_rank=read("r2_rank"),
        r2_interpolation=read("r2_loo", of="interpolation"),
        beta=read("beta", column="lo"),
        delta=read("kappa" if form == "exponential" else "delta", column="lo"),
        **{f"r2_{kind}": read("r2_log", scope=kind) for kind in ("attention", "mlp") if kind in kinds},
    )


def gate_allocate(*, plans: pd.DataFrame, gates: Gates) -> pd.DataFrame:
    """Does the optimal plan differ from the uniform one? objective_gap = largest 1 - optimal / uniform of a budget."""
    objective = plans[plans["strategy"].isin(["optimal", "uniform"])].groupby(["budget", "strategy"])["objective"].min()
    wide = objective.unstack("strategy").reindex(columns=["optimal", "uniform"]).dropna()
    gap = (1 - wide["optimal"] / wide["uniform"]).max()
    return _frame(gates, "allocate", objective_gap=(gap, "candidates.parquet"))


def gate_pilot(*, plans: pd.DataFrame, evaluate: pd.DataFrame, gates: Gates) -> pd.DataFrame:
    """Do plans that use the sensitivities win on the select split, at equal bytes?

    All at one budget: the smallest with 2.4 to 2.7 bits a weight; where there is none, the smallest of all for
    `manual_gain` = 1 - PPL manual / PPL uniform, and nothing for `optimal_recovery` = (nll uniform - nll best) /
    (nll uniform - nll reference). The latter also says GO when best gains 5 % PPL over uniform; `why` states that
    gain. `best` is the plan of that strategy or, while it is not chosen, what will be: the one of least KL among the
    optimal, its runners-up (`optimal_<n>`) and the uniform plan, so that the pilot does not pick by what it measures.
    nll and KL are means over the corpora; PPL = exp(nll).
    """
    from bitalloc.tables import without_arms

    plans = without_arms(plans)
    nll = _means(evaluate, "perplexity", "nll_nats_per_token")
    kl = _means(evaluate, "divergence", "kl_nats_per_token")
    budget, steep = _pilot_budget(plans)
    at = plans[plans["budget"] == budget].set_index("strategy")["plan"]
    entrants = at[at.index.str.fullmatch(r"optimal(_\d+)?|uniform")]
    if "best" not in at.index and "optimal" in at.index and all(plan in kl for plan in entrants):
        at["best"] = min(entrants, key=lambda plan: kl[plan])
    uniform, manual, best = (nll.get(at.get(name), math.nan) for name in ("uniform", "manual", "best"))
    won = uniform - best if steep else math.nan
    excess = uniform - nll.get("reference", math.nan)
    gain = 1 - math.exp(-won)
    frame = _frame(
        gates,
        "pilot",
        manual_gain=(1 - math.exp(manual - uniform), "select.parquet"),
        optimal_recovery=(won / excess if excess > 0 else None, "select.parquet"),
    )
    if math.isfinite(gain):
        here = frame["check"] == "optimal_recovery"
        frame.loc[here, "go"] |= gain >= PILOT_GAIN
        note = f"PPL {gain:.1%} below uniform at {budget}; 5 % passes too"
        frame.loc[here, "why"] = [f"{why}; {note}" if why else note for why in frame.loc[here, "why"]]
    return frame


def gate_compress(*, checkpoints: pd.DataFrame, gates: Gates) -> pd.DataFrame:
    """Do checkpoints have the promised size? predicted_bytes = largest |bytes on disk / predicted - 1|."""
    off = (checkpoints["nbytes"] / checkpoints["predicted_nbytes"] - 1).abs()
    return _frame(gates, "compress", predicted_bytes=(off.max(skipna=False), "checkpoints.parquet"))


def gate_fairness(*, languages: pd.DataFrame, gates: Gates) -> pd.DataFrame:
    """Is there more than one language to be fair to? languages = those in which the reference is above its floor."""
    above = languages.loc[~languages["floor"], "language"].nunique()
    return _frame(gates, "fairness", languages=(above, "languages.parquet"))


def gate_downstream(*, plans: pd.DataFrame, evaluate: pd.DataFrame, gates: Gates) -> pd.DataFrame:
    """Does the best plan of the largest budget keep the tasks? downstream = most points of accuracy lost in a task.

    Tasks in which the reference itself is not above chance (lower end of its interval) have nothing to lose and
    are left out. Without any task there is nothing to check: no row.
    """
    from bitalloc.statistics import accuracies

    scores = accuracies(evaluate)
    if len(evaluate) and scores.empty:
        return _frame(gates, "downstream")
    reference = scores[scores["plan"] == "reference"].set_index(["suite", "task"])
    able = reference[reference["status"] != "floor"]
    if len(reference) and able.empty:
        return _frame(gates, "downstream")
    best = plans[plans["strategy"] == "best"].sort_values("budget_bytes")["plan"].tail(1)
    kept = scores[scores["plan"].isin(best)].set_index(["suite", "task"])["value"]
    lost = 100 * (able["value"] - kept.reindex(able.index))
    return _frame(gates, "downstream", downstream=(lost.max(skipna=False), "evaluate.parquet"))


def _spread(values: pd.Series) -> float | None:
    return values.max() / values.min() if len(values) else None


def _means(evaluate: pd.DataFrame, suite: str, metric: str) -> dict[str, float]:
    """Plan -> mean over the corpora, for plans that have a number on each of them."""
    rows = evaluate[(evaluate["suite"] == suite) & (evaluate["metric"] == metric)].dropna(subset="value")
    corpora = rows["task"].nunique()
    return {plan: part["value"].mean() for plan, part in rows.groupby("plan") if len(part) == corpora}


def _pilot_budget(plans: pd.DataFrame) -> tuple[str | None, bool]:
    """The budget of the pilot, and whether it lies in the steep range."""
    if plans.empty:
        return None, False
    first = plans.sort_values("budget_bytes").drop_duplicates("budget").set_index("budget")
    bpw = first["bits_per_weight"] * first["budget_bytes"] / first["nbytes"]
    steep = bpw[bpw.between(*STEEP_BPW)]
    return str((steep if len(steep) else bpw).index[0]), len(steep) > 0


def _frame(gates: Gates, gate: str, **measured: tuple[Any, str]) -> pd.DataFrame:
    """GATES rows of check=(value, evidence); a value that is no finite number is missing and a NO-GO."""
    import pandas as pd

    from bitalloc import tables

    rows = []
    for name, (found, evidence) in measured.items():
        check = getattr(gates.checks, name)
        # ten digits: 100 (1 - 0.98) is 2 points, whatever binary fractions make of it
        value = float(f"{found:.10g}") if found is not None and math.isfinite(found) else math.nan
        comparison = _COMPARISONS.get(name, ">")
        go = {">": value > check.threshold, ">=": value >= check.threshold, "<=": value <= check.threshold}
        row = {"gate": gate, "check": name, "value": value, "threshold": check.threshold, "comparison": comparison}
        mode = check.mode or gates.mode
        rows.append(row | {"go": go[comparison], "mode": mode, "why": check.why, "evidence": evidence})
    return pd.DataFrame(rows, columns=tables.GATES.names)


# ---------------------------------------------------------------------------------------------- verdicts


def write_verdict(path: Path, gate: str, frame: pd.DataFrame) -> None:
    """The verdict file of a gate: {"gate", "go", "route", "checks"}.

    GO unless a check of mode `stop` fails. The route is that of `ROUTES` (`main` where there is but one), the
    second one when a check of mode `fallback` fails. No rows at all are a GO only for `downstream`.
    """
    checks = [_plain(row) for row in frame.to_dict("records")]
    fell_back = any(row["mode"] == "fallback" and not row["go"] for row in checks)
    verdict = {
        "gate": gate,
        "go": bool(checks or gate == "downstream") and not any(_stops(row) for row in checks),
        "route": ROUTES.get(gate, ("main", "main"))[fell_back],
        "checks": checks,
    }
    write_atomically(path, (json.dumps(verdict, indent=1, allow_nan=False) + "\n").encode())


def read_verdict(path: Path | str) -> dict[str, Any]:
    """The verdict at `path`; raises `BitallocError` when it is absent or not one."""
    try:
        verdict = json.loads(Path(path).read_text(encoding="utf-8"))
        sound = isinstance(verdict["go"], bool) and isinstance(verdict["checks"], list)
        sound = sound and isinstance(verdict["gate"], str) and isinstance(verdict["route"], str)
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise BitallocError(f"cannot read the gate verdict {path}; delete it and rerun, it is made again")
    return verdict


def message(frame: pd.DataFrame) -> str:
    """What a stop sign says: a line for each check that stops, with value, threshold, evidence and how to go on."""
    lines = []
    for row in map(_plain, frame.to_dict("records")):
        if _stops(row):
            name, measured = row["check"], "could not be measured" if row["value"] is None else f"is {row['value']:.4g}"
            lines.append(
                f"NO-GO at gate {row['gate']}: {name} {measured}, must be {row['comparison']} {row['threshold']:g} "
                f"(evidence: {row['evidence']}). To go on: set gates.checks.{name}.threshold, or "
                f"gates.checks.{name}.mode: warn with the reason in gates.checks.{name}.why, or gates.mode: warn"
            )
    return "\n".join(lines)


def _stops(row: Mapping[str, Any]) -> bool:
    return row["mode"] == "stop" and not row["go"]


def _standing(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "missing"
    return f"{row['value']:.3g} {_REFUSED[row['comparison']]} {row['threshold']:g}"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a missing value as None and a Python bool, as JSON has them."""
    value = row["value"]
    missing = value is None or not math.isfinite(value)
    return {**row, "value": None if missing else float(value), "go": bool(row["go"])}
