"""What an evaluation costs before it starts: plans x items x tokens at a rate; and whether it may.

`python -m bitalloc.cost qwen2_7b` plans it from the configuration alone, before there are weights, plans or a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from bitalloc.errors import BitallocError

NAMED, POOL = "named", "pool"
COLUMNS = ("suite", "task", "role", "plans", "items", "tokens", "stored_tokens", "rate_tokens_per_s", "hours")


def needed(points: float, discordant: float) -> int:
    """Items that show a paired difference of `points` (of 100) with 80 % power at the 5 % level:

    n = q (2.8 / (points / 100))^2, q = share of items on which two plans differ; independent items assumed. It inverts
    `statistics.detectable_points`.

    >>> needed(5, 0.10), needed(6.9, 0.10), needed(2.0, 0.05)  # HumanEval has 164 items
    (314, 165, 980)
    """
    return math.ceil(discordant * (280 / points) ** 2)


@dataclass(frozen=True)
class Work:
    """What one plan has to read for one task: `items` of it, `tokens` in all, `stored` of them answered already.

    `writes`: the tokens are generated, one a pass. `seconds` is what is known to take that long whatever the rate.
    """

    suite: str
    task: str
    items: int
    tokens: int = 0
    stored: int = 0
    writes: bool = False
    seconds: float = 0.0


def estimate(works: Iterable[tuple[str, Work]], rates: Mapping[bool, float]) -> pd.DataFrame:
    """COST of (role, work of one plan); `rates`: tokens a second that the model reads (False) and writes (True).

    >>> work = Work("windows", "a/report", items=2, tokens=7200, stored=3600)
    >>> frame = estimate([("named", work), ("named", work), ("pool", work)], {False: 1.0})
    >>> frame[["role", "plans", "items", "tokens", "hours"]].values.tolist()
    [['named', 2, 4, 14400, 2.0], ['pool', 1, 2, 7200, 1.0]]
    """
    rows = []
    for role, work in works:
        rate = rates.get(work.writes) if work.tokens else None
        hours = ((work.tokens - work.stored) / rate if rate else 0.0) / 3600 + work.seconds / 3600
        counts = (1, work.items, work.tokens, work.stored)
        rows.append((work.suite, work.task, role, *counts, rate or math.nan, hours))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    how = dict.fromkeys(("plans", "items", "tokens", "stored_tokens", "hours"), "sum") | {"rate_tokens_per_s": "first"}
    return frame.groupby(["suite", "task", "role"], sort=False).agg(how).reset_index()[list(COLUMNS)]


def told(cost: pd.DataFrame) -> str:
    """COST as a block of lines, with its sum."""
    header = ("suite", "task", "role", "plans", "items", "tokens", "in store", "tokens/s", "hours")
    rows = [
        (
            row.suite, row.task, row.role, f"{row.plans:,}", f"{row.items:,}", f"{row.tokens:,}",
            f"{row.stored_tokens / row.tokens:.0%}" if row.tokens else "-",
            "-" if math.isnan(row.rate_tokens_per_s) else f"{row.rate_tokens_per_s:,.0f}", f"{row.hours:.3g}",
        )
        for row in cost.itertuples()
    ]  # fmt: skip
    tokens, stored = int(cost["tokens"].sum()), int(cost["stored_tokens"].sum())
    share = f"{stored / tokens:.0%}" if tokens else "-"
    rows.append(("all", "", "", "", "", f"{tokens:,}", share, "", f"{cost['hours'].sum():.3g}"))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        return "  " + "  ".join([*left, *right]).rstrip()

    return "\n".join(map(line, [header, *rows]))


def check(cost: pd.DataFrame, *, ceiling_hours: float | None, points: float | None) -> None:
    """Raise `BitallocError` where COST lies above the ceiling, with the numbers that would fit below it.

    >>> work = Work("world", "facts", items=10, tokens=3600)
    >>> cost = estimate([("named", work), *[("pool", work)] * 9], {False: 1.0})
    >>> check(cost, ceiling_hours=10, points=5)
    >>> check(cost, ceiling_hours=4, points=5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    bitalloc.errors.BitallocError: the evaluation is estimated to take 10 hours, evaluate.ceiling_hours is 4...
    """
    hours = float(cost["hours"].sum())
    if ceiling_hours is None or hours <= ceiling_hours:
        return
    pool = cost[cost["role"] == POOL]
    rest = ceiling_hours - float(cost.loc[cost["role"] == NAMED, "hours"].sum())
    fits = []
    if rest <= 0 or pool.empty:
        share = ceiling_hours / (hours - float(pool["hours"].sum()))
        fits.append(f"{share:.0%} of the windows and items of the named plans, and no pool (retrieve.report_windows, "
                    "limits in evaluate.tasks)")  # fmt: skip
    else:
        plans = int(pool["plans"].max())
        fits.append(f"{int(plans * rest / pool['hours'].sum())} random plans in all instead of {plans} (allocate.pool)")
        tasks = float(pool.loc[~pool["suite"].isin(["windows", "weights"]), "hours"].sum())
        left = rest - (float(pool["hours"].sum()) - tasks)
        if points is not None and tasks and left > 0:
            fewer = math.ceil(10 * points * math.sqrt(tasks / left)) / 10
            fits.append(f"evaluate.pool_points: {fewer:g} instead of {points:g}")
    raise BitallocError(
        f"the evaluation is estimated to take {hours:.3g} hours, evaluate.ceiling_hours is {ceiling_hours:g}; it would "
        f"fit with {', or '.join(fits)}; or raise the ceiling"
    )
