"""What an evaluation costs before it starts: plans x items x tokens at a rate; and whether it may.

`python -m bitalloc.cost qwen2_7b` plans it from the configuration alone, before there are weights, plans or a device.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bitalloc import config
from bitalloc.errors import BitallocError

NAMED, POOL = "named", "pool"
COLUMNS = ("suite", "task", "role", "plans", "items", "tokens", "stored_tokens", "rate_tokens_per_s", "hours")


def needed(points: float, discordant: float) -> int:
    """Items that show a paired difference of `points` (of 100) with 80 % power at the 5 % level:

    n = max(q (2.8 / d)^2, 6 / d), d = points / 100, q = share of items on which two plans differ; independent items
    assumed. It inverts `statistics.detectable_points`.

    >>> needed(5, 0.10), needed(6.9, 0.10), needed(2.0, 0.05)  # HumanEval has 164 items
    (314, 165, 980)
    """
    return math.ceil(max(discordant * (280 / points) ** 2, 600 / points) - 1e-9)


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


# ---- before there is anything but a configuration
# tasks of lm-eval: items, and tokens of one by Qwen2's tokenizer, what prompts share counted once, as `Harness.works`
# counts on local copies (of gsm8k those that are written); the last four are guesses
TASKS = {
    "mmlu": (14_042, 103), "hellaswag": (10_042, 166), "piqa": (1_838, 68), "gsm8k": (1_319, 256),
    "arc_easy": (2_376, 60), "arc_challenge": (1_172, 60), "winogrande": (1_267, 60), "lambada_openai": (5_153, 90),
}  # fmt: skip
OTHER = (1_000, 100)  # of a task that is not among them
WORLD_TOKENS = 60
COMPONENT = 12  # plans of the arm `component`: six steps of two components
WRITTEN = {"gsm8k"}
FLOPS, BANDWIDTH, UTILISATION = 71e12, 936e9, 0.4  # a card of 24 GB (RTX 3090), published; the share is a guess


def plan(settings: config.Config, parameters: float) -> tuple[pd.DataFrame, str]:
    """COST of a model of so many parameters from its configuration, and on what the rates rest.

    A pass over a token takes 2 parameters operations, at `UTILISATION` of the card's; writing one reads all weights of
    16 bits once for a batch. Both are arithmetic, not measurements.
    """
    evaluate, allocate, retrieve = settings.evaluate, settings.allocate, settings.retrieve
    budgets = len(allocate.budgets)
    named = 1 + evaluate.rerun + budgets * (len(allocate.strategies) + 1)  # and `best`
    named += budgets * ("leaked" in allocate.arms) + COMPONENT * ("component" in allocate.arms)
    named += len(allocate.rules) + len(allocate.plans)
    works: list[tuple[str, Work]] = []
    for role, plans in ((NAMED, named), (POOL, budgets * allocate.pool)):
        limit = math.inf
        if role == POOL and evaluate.pool_points is not None:
            limit = needed(evaluate.pool_points, evaluate.pool_discordant)
        every = []
        if {"perplexity", "divergence"}.intersection(evaluate.suites):
            tokens = retrieve.report_windows * retrieve.window
            every += [
                Work("windows", f"{corpus}/report", retrieve.report_windows, tokens) for corpus in retrieve.report
            ]
        if "world" in evaluate.suites:
            every += [_items("world", name, count, WORLD_TOKENS, limit) for name, count in retrieve.items.items()]
        if "downstream" in evaluate.suites:
            for name, task in evaluate.tasks.items():
                count, tokens = TASKS.get(name, OTHER)
                drawn = min(count, (task.limit or count) * (57 if name == "mmlu" else 1))
                every.append(_items("downstream", name, drawn, tokens, limit))
        works += [(role, work) for _ in range(plans) for work in every]
    rates = {False: UTILISATION * FLOPS / (2 * parameters), True: evaluate.batch * BANDWIDTH / (2 * parameters)}
    basis = (
        f"arithmetic for {parameters:.3g} parameters on a card of {FLOPS / 1e12:.0f} TFLOP/s, of which "
        f"{UTILISATION:.0%} are guessed to be reached, and {BANDWIDTH / 1e9:.0f} GB/s; nothing was measured"
    )
    return estimate(works, rates), basis


def _items(suite: str, task: str, items: int, tokens: int, limit: float) -> Work:
    count = int(min(items, limit))
    return Work(suite, task, count, count * tokens, writes=task in WRITTEN)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bitalloc.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="name in the model sheet")
    parser.add_argument("--parameters", type=float, help="of the model, 7.6e9; else read from its name (qwen2_7b)")
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="files laid over the configuration")
    given = parser.parse_args(arguments)
    files = [Path("config/config.yaml"), Path("config/models.yaml"), *given.config]
    settings = config.load(*files).for_model(given.model)
    parameters = given.parameters
    if parameters is None:
        if not (match := re.search(r"_(?:(\d+)_)?(\d+)b$", given.model)):
            raise BitallocError(f"the name {given.model} does not tell how large the model is: add --parameters 7.6e9")
        parameters = float(f"{match[1]}.{match[2]}" if match[1] else match[2]) * 1e9
    if not 0 < parameters < math.inf:
        raise BitallocError(f"--parameters {parameters:g} is no number of parameters; 7.6e9 for example")
    cost, basis = plan(settings, parameters)
    evaluate = settings.evaluate
    print(f"{given.model}: {basis}\n{told(cost)}")
    check(cost, ceiling_hours=evaluate.ceiling_hours, points=evaluate.pool_points)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BitallocError as error:
        sys.exit(f"error: {error}")
