"""Execute: samples of HumanEval in the sandbox -> OUTCOMES, and pass@1 of every plan -> HUMANEVAL.

Only where the configuration says so, and only inside `bitalloc.sandbox`, which refuses rather than run uncontained.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import comb, sqrt
from typing import TYPE_CHECKING, Any

from bitalloc import config, sandbox
from bitalloc.config import parse_bytes
from bitalloc.errors import BitallocError
from bitalloc.progress import Progress

if TYPE_CHECKING:
    import pandas as pd  # imported where frames are made: `permit` is asked at every start of snakemake

REFERENCE = "reference"


def permit(settings: config.HumanEval) -> None:
    """Raise `BitallocError` unless the user has switched execution on."""
    if not settings.execute:
        raise BitallocError(
            "humaneval.execute is off: nothing that a model wrote is executed; to have it executed in bubblewrap: "
            "--config 'humaneval={execute: true}'"
        )


def execute(samples: pd.DataFrame, settings: config.HumanEval, *, workers: int) -> pd.DataFrame:
    """OUTCOMES of SAMPLES, each in fresh sandboxes, `workers` at a time.

    Raises `BitallocError` when execution is off, when nothing here can contain a program, and when a problem's
    own tests cannot be run.
    """
    import pandas as pd

    from bitalloc.tables import OUTCOMES

    permit(settings)
    backend = sandbox.backend()
    limits = sandbox.Limits(wall_s=settings.timeout_s, memory_nbytes=parse_bytes(settings.memory))
    progress = Progress("execute", len(samples), unit="programs")

    def judge(row: Mapping[str, Any]) -> sandbox.Verdict:
        if row["unfit"]:
            return sandbox.Verdict("unfit", "", 0.0)
        program = row["prompt"] + row["completion"]
        given = {name: row[name] for name in ("prompt", "test", "entry_point")}
        return sandbox.judge(program, **given, limits=limits)

    verdicts = []
    with ThreadPoolExecutor(workers) as pool:
        for verdict in pool.map(judge, samples.to_dict("records")):
            verdicts.append(vars(verdict))
            progress.advance()
    frame = samples[["plan", "task_id", "truncated"]].join(pd.DataFrame(verdicts))
    frame = frame.assign(passed=frame["outcome"] == "passed", sandbox_backend=backend)
    return frame[OUTCOMES.names]


# ---- scores ------------------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k = 1 - C(n - c, k) / C(n, k) of n samples of which c pass (Chen et al. 2021, eq. 1).

    Of 5 samples 2 pass: one drawn passes with 2/5, and of 3 drawn none does with 1/10.

    >>> pass_at_k(5, 2, 1), pass_at_k(5, 2, 3), pass_at_k(5, 0, 1)
    (0.4, 0.9, 0.0)
    """
    return 1 - comb(n - c, k) / comb(n, k)


def score(outcomes: pd.DataFrame, settings: config.HumanEval) -> pd.DataFrame:
    """HUMANEVAL of OUTCOMES: pass@1 = mean over problems of `pass_at_k(1, passed, 1)`, one greedy sample each.

    Floor: the unquantised model solves nothing, so that no plan can be worse.
    """
    import pandas as pd

    from bitalloc.statistics import share_interval
    from bitalloc.tables import HUMANEVAL

    reference = outcomes[outcomes["plan"] == REFERENCE]
    if reference.empty:
        raise BitallocError(f"humaneval: no outcomes of {REFERENCE}, which says whether there is anything to lose")
    status = "ok" if reference["passed"].any() else "floor"
    protocol = (
        f"HumanEval as in lm-eval's task humaneval: zero-shot, greedy, at most {settings.max_new_tokens} tokens; "
        f"tests and program in sandboxes apart, {settings.timeout_s:g} s, {settings.memory}; 95 % Wilson interval"
    )
    rows = []
    for plan, part in outcomes.groupby("plan", sort=False):
        n, c = len(part), int(part["passed"].sum())
        value = sum(pass_at_k(1, int(passed), 1) for passed in part["passed"]) / n
        lo, hi = share_interval(c / n, 0.0, n)
        row = {"plan": plan, "metric": "pass@1", "value": value, "lo": lo, "hi": hi, "n": n}
        row |= {"stderr": sqrt(value * (1 - value) / max(n - 1, 1)), "status": status, "protocol": protocol}
        row |= {
            "truncated": int(part["truncated"].sum()),
            "sandbox_backend": "; ".join(sorted(set(part["sandbox_backend"]))),
        }
        row |= {
            name: int((part["outcome"] == outcome).sum())
            for name, outcome in (("unfit", "unfit"), ("timeouts", "timeout"))
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=HUMANEVAL.names)
