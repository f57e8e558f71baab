"""Rank versus bits: at equal bytes, is a low-rank part worth more than the bits that it takes the place of?

From the sweep's own experiments, matrix by matrix (`phase`), and from what the joint plan and its controls measure on
the report windows (`controls`).

Bytes may be shared: of two matrices alike one can take more and the other less, so what a family of options costs at a
level is their lower convex hull. Without that a level between two bit-widths would go to rank for no better reason
than that nothing else fills the gap; `ratio_alone` shows this case too. `saved` compares the options of rank 0 with all
options, `ratio` with those that have rank. Nothing is extrapolated: a level above the largest code that was swept is
out of reach.

Shapes: K options, L levels, M matrices of one shape, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bitalloc.errors import BitallocError
from bitalloc.option import PASS_THROUGH, Option
from bitalloc.statistics import mean_interval, resample
from bitalloc.tables import CONTROLS, PHASE, without_arms

Array = NDArray[np.float64]

LEVELS = np.arange(200, 451, 5) / 100  # bits a weight
PAYS = 0.02  # share of the cost that rank must save to be called worth offering
JOINT, CONTROL = "optimal", ("bits_only", "rank_only")
METRICS = ("nll_nats_per_token", "kl_nats_per_token")
BITS, RANK, OPEN, BEYOND = "bits", "rank", "open", "out of reach"


@dataclass(frozen=True)
class Hull:
    """The least cost of a family of options at any size: corners by rising bytes and falling cost."""

    nbytes_C: Array
    cost_C: Array
    option_C: list[str]
    most: float  # bytes of the family's largest option

    def cost(self, nbytes_L: Array) -> Array:
        """[L] missing below the smallest option and above the largest."""
        cost_L = np.interp(nbytes_L, self.nbytes_C, self.cost_C)
        return np.where((nbytes_L >= self.nbytes_C[0]) & (nbytes_L <= self.most), cost_L, np.nan)

    def names(self, nbytes_L: Array) -> list[str]:
        """The options that share the bytes at each level; empty where the family is out of reach."""
        found = []
        for nbytes, cost in zip(nbytes_L, self.cost(nbytes_L), strict=True):
            after = int(np.searchsorted(self.nbytes_C, nbytes, side="right"))
            pair = (
                self.option_C[after - 1 : after + 1]
                if nbytes > self.nbytes_C[after - 1]
                else [self.option_C[after - 1]]
            )
            found.append("" if np.isnan(cost) else " + ".join(pair))
        return found


def hull(nbytes_K: Sequence[float], cost_K: Sequence[float], option_K: Sequence[str]) -> Hull:
    """The lower convex hull of the options, up to the cheapest of them.

    >>> found = hull([100, 200, 300, 150], [8.0, 4.0, 3.0, 7.0], ["2b", "3b", "4b", "2b r8"])
    >>> found.option_C, found.cost(np.array([99.0, 150.0, 300.0, 301.0])).tolist()
    (['2b', '3b', '4b'], [nan, 6.0, 3.0, nan])
    """
    corners: list[tuple[float, float, str]] = []
    for point in sorted(zip(map(float, nbytes_K), map(float, cost_K), option_K, strict=True)):
        if corners and point[1] >= corners[-1][1]:
            continue  # larger and no cheaper
        while len(corners) > 1 and _above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    nbytes_C, cost_C, option_C = zip(*corners, strict=True)
    return Hull(np.array(nbytes_C), np.array(cost_C), list(option_C), float(max(nbytes_K)))


def _above(a: tuple[float, float, str], b: tuple[float, float, str], c: tuple[float, float, str]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def phase(
    sweep: pd.DataFrame,
    sensitivity: pd.DataFrame,
    inventory: pd.DataFrame,
    plans: pd.DataFrame,
    *,
    signal: str,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """The PHASE frame: every matrix, then every kind and shape, at the levels of the grid and of the budgets.

    `plans` are PLANS. A shape's ratio is that of its matrices' summed costs, with a percentile bootstrap over its
    matrices, few as they are: the spread between matrices, not the error of a measurement. A matrix by itself has no
    interval: its costs are exact for the calibrate windows. Raises `BitallocError` where the tables do not cover the
    same matrices.
    """
    coefficient = sensitivity[sensitivity["signal"] == signal].set_index("layer")["coefficient"]
    sides = inventory[inventory["claimed"]].set_index("layer")[["rows", "columns"]]
    swept = sweep[sweep["quantizer"] != PASS_THROUGH]
    if off := sorted(set(swept["layer"]) - (set(coefficient.index) & set(sides.index))):
        raise BitallocError(
            f"sweep and sensitivity by {signal} differ in {off[0]} ({len(off)} matrices); repeat that stage"
        )
    levels = [("", float(level)) for level in LEVELS]
    for row in without_arms(plans).drop_duplicates("budget").itertuples():
        levels.append((row.budget, row.bits_per_weight * row.budget_bytes / row.nbytes))
    budget_L, level_L = [text for text, _ in levels], np.array([level for _, level in levels], dtype=float)
    matrices: list[pd.DataFrame] = []
    for layer, options in swept.groupby("layer", sort=False):
        rows, columns = map(int, sides.loc[layer])
        first = options.iloc[0]
        place = {"model": first["model"], "scope": "matrix", "name": layer, "kind": first["kind"]}
        place |= {"rows": rows, "columns": columns, "width": min(rows, columns), "n": 1}
        costs = options.assign(cost=options["rel_error"] * coefficient[layer])
        at = compare(costs, np.floor(level_L * rows * columns / 8 + 1e-6))
        matrices.append(at.assign(**place, budget=budget_L, bits_per_weight=level_L))
    whole = pd.concat(matrices, ignore_index=True)
    shapes = [
        _shape(part, budget_L, level_L, resamples, [seed, *f"{kind} {rows} {columns}".encode()])
        for (kind, rows, columns), part in whole.groupby(["kind", "rows", "columns"], sort=False)
    ]
    frame = pd.concat([whole, *shapes], ignore_index=True)
    judged = frame[["saved", "saved_lo", "saved_hi"]].itertuples(index=False, name=None)
    return frame.assign(winner=[_winner(*row) for row in judged])[PHASE.names]


def compare(options: pd.DataFrame, nbytes_L: Array) -> pd.DataFrame:
    """One matrix at each level: what both families cost, by which options, their ratio, and what rank saves.

    `options` has the columns quantizer, bits, group_size, rank, nbytes and cost.
    """
    names = [
        Option(*place).name for place in options[["quantizer", "bits", "group_size", "rank"]].itertuples(index=False)
    ]
    options = options.assign(option=names)
    families = {"bits_only": options[options["rank"] == 0], "with_rank": options[options["rank"] > 0], "joint": options}
    found: dict[str, object] = {}
    alone: dict[str, Array] = {}
    for family, mine in families.items():
        if mine.empty:
            found |= {family: "", f"cost_{family}": np.nan}
            alone[family] = np.full(len(nbytes_L), np.nan)
            continue
        its = hull(mine["nbytes"], mine["cost"], mine["option"])
        found |= {family: its.names(nbytes_L), f"cost_{family}": its.cost(nbytes_L)}
        least_L = np.where(mine["nbytes"].to_numpy() <= nbytes_L[:, None], mine["cost"].to_numpy(), np.inf).min(axis=1)
        alone[family] = np.where(np.isfinite(least_L) & (nbytes_L <= its.most), least_L, np.nan)
    frame = pd.DataFrame(found, index=range(len(nbytes_L))).drop(columns="joint")
    return frame.assign(
        ratio=frame["cost_with_rank"] / frame["cost_bits_only"],
        saved=1 - frame["cost_joint"] / frame["cost_bits_only"],
        ratio_alone=alone["with_rank"] / alone["bits_only"],
    )


def _shape(
    matrices: pd.DataFrame, budget_L: list[str], level_L: Array, resamples: int, seed: list[int]
) -> pd.DataFrame:
    """The rows of all matrices of one kind and shape together."""
    first, costs = matrices.iloc[0], ["cost_bits_only", "cost_with_rank", "cost_joint"]
    bits_ML, rank_ML, joint_ML = (matrices[name].to_numpy(float).reshape(-1, len(level_L)) for name in costs)
    count_RM = resample(np.zeros(len(bits_ML)), resamples, np.random.default_rng(seed))

    def share(part_ML: Array) -> Array:
        """[3, L] part / bits over all matrices, and the ends of its interval if they are several."""
        value_L = part_ML.sum(axis=0) / bits_ML.sum(axis=0)
        if len(bits_ML) < 2:
            return np.stack([value_L, *np.full((2, len(level_L)), np.nan)])
        return np.stack([value_L, *np.quantile((count_RM @ part_ML) / (count_RM @ bits_ML), [0.025, 0.975], axis=0)])

    ratio, saved = share(rank_ML), (1 - share(joint_ML))[[0, 2, 1]]
    alone = np.log(matrices["ratio_alone"].to_numpy(float).reshape(-1, len(level_L)))
    return pd.DataFrame({
        **{name: first[name] for name in ("model", "kind", "rows", "columns", "width")},
        "scope": "shape", "name": f"{first['kind']} {first['rows']} x {first['columns']}", "n": len(bits_ML),
        "budget": budget_L, "bits_per_weight": level_L, "bits_only": "", "with_rank": "",
        **{name: matrices[name].to_numpy(float).reshape(-1, len(level_L)).sum(axis=0) for name in costs},
        **dict(zip(("ratio", "ratio_lo", "ratio_hi"), ratio, strict=True)),
        **dict(zip(("saved", "saved_lo", "saved_hi"), saved, strict=True)),
        "ratio_alone": np.exp(alone.mean(axis=0)),
    })  # fmt: skip


def _winner(saved: float, lo: float, hi: float) -> str:
    """What the saving says, with its interval if it has one.

    >>> _winner(0.10, 0.03, 0.20), _winner(0.10, 0.01, 0.20), _winner(0.01, math.nan, math.nan), _winner(math.nan, 0, 0)
    ('rank', 'open', 'bits', 'out of reach')
    """
    if math.isnan(saved):
        return BEYOND
    if min(saved, lo) >= PAYS:
        return RANK
    return BITS if max(saved, hi) < PAYS else OPEN


def controls(
    plans: pd.DataFrame, responses: pd.DataFrame, frames: Mapping[str, pd.DataFrame], *, resamples: int, seed: int
) -> pd.DataFrame:
    """The CONTROLS frame: NLL and KL of the joint plan less those of each control, in nats a token.

    `frames` holds the PLAN of each named plan. A control without a plan, or with the joint one, says so in its status.
    """
    rows: list[dict] = []
    for budget, group in plans.groupby("budget", sort=False):
        at = group.set_index("strategy")
        if JOINT not in at.index:
            continue
        joint = at.loc[JOINT]
        for control in CONTROL:
            blank = {"budget": budget, "control": control, "task": "", "n": 0}
            if control not in at.index:
                reason = joint["note"].partition(f"no {control}: ")[2].partition("; no ")[0]
                status = f"no plan: {reason or 'it is not in allocate.strategies'}"
                rows += [blank | {"metric": metric, "status": status} for metric in METRICS]
                continue
            same = frames[joint["plan"]].equals(frames[at.loc[control, "plan"]])
            found = list(_paired(responses, joint["plan"], at.loc[control, "plan"], resamples, seed))
            rows += [blank | row | {"status": "same plan" if same else "ok"} for row in found]
            if not found:
                rows += [blank | {"metric": metric, "status": "not evaluated"} for metric in METRICS]
    return pd.DataFrame(rows, columns=CONTROLS.names)


def _paired(responses: pd.DataFrame, joint: str, alone: str, resamples: int, seed: int) -> Iterator[dict]:
    """One row a corpus and metric; windows of both plans are drawn together."""
    mine = responses[
        responses["plan"].isin([joint, alone])
        & responses["metric"].isin(METRICS)
        & responses["task"].str.endswith("/report")
    ]
    for (task, metric), part in mine.groupby(["task", "metric"], sort=False):
        wide = part.pivot(index="plan", columns="item", values="value")
        if len(wide) < 2 or wide.isna().to_numpy().any():
            raise BitallocError(
                f"responses: {joint} and {alone} lack windows of {task}, so they cannot be paired; rerun evaluate"
            )
        weight_I = part.drop_duplicates("item").set_index("item").loc[wide.columns, "weight"].to_numpy(float)
        difference_I = (wide.loc[joint] - wide.loc[alone]).to_numpy(float)
        count_RI = resample(np.zeros(len(weight_I)), resamples, np.random.default_rng([seed, *str(task).encode()]))
        drawn_R = (count_RI @ (weight_I * difference_I)) / (count_RI @ weight_I)
        found = mean_interval(float(np.average(difference_I, weights=weight_I)), drawn_R, len(weight_I))
        means = {plan: float(np.average(wide.loc[plan], weights=weight_I)) for plan in (joint, alone)}
        yield {
            "task": task, "metric": metric, "joint": means[joint], "alone": means[alone], "value": found.value,
            "lo": found.lo, "hi": found.hi, "n": len(weight_I),
        }  # fmt: skip
