"""Position: does it matter where precision is kept? Plans by rule, and the verdicts of a study over several models.

`python -m bitalloc.position 24 --rule early` writes the plan of a rule for a model of that many blocks, or of that name
in the model sheet, without its weights.

What a rule does is told by its damage D against the unquantised model: mean KL, or ln(PPL / PPL of the reference), in
nats a token. What high precision of some MLPs is worth is B(rule) = D(all_low) - D(rule), at equal bytes for early,
middle and late. "Twice as good as" is B(a) - 2 B(b) > 0: a ratio would have no interval where B(b) is near 0. All are
means over windows, so plans are paired window by window. Intervals: 95 %, Student's t with the bootstrap's deviation.

Legend: I windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from bitalloc.config import Model, Study, load
from bitalloc.errors import BitallocError
from bitalloc.statistics import Estimate, mean_interval, resample, units_drawn
from bitalloc.statistics.verdicts import MET, NOT_MET, NOT_RUN, OPEN, above, below
from bitalloc.strategies.position import RULES, position
from bitalloc.tables import CRITERIA, POSITION

KL, RATIO = "kl_nats_per_token", "ln_ppl_ratio"
METRICS = (RATIO, KL)
REFERENCE = "reference"
MARGIN = 0.001  # nats a token: a thousandth of PPL, within which real INT8 counts as no loss
RIVALS = ("middle", "late")
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model of a study: RESPONSES of its plans by rule, their bytes, and BACKENDS of the plans that really ran."""

    name: str
    sheet: Model
    responses: pd.DataFrame
    nbytes: Mapping[str, int]
    backends: pd.DataFrame


class Damage:
    """Damage of every rule on one corpus by one metric, window by window."""

    def __init__(self, responses: pd.DataFrame, corpus: str, metric: str, *, resamples: int, seed: int) -> None:
        rows = responses[(responses["task"] == f"{corpus}/report") & (responses["metric"] == metric)]
        values = rows.pivot(index="item", columns="plan", values="value")
        items = rows.drop_duplicates("item").set_index("item").loc[values.index]
        self.values, self.weight_I = values, items["weight"].to_numpy(dtype=float)
        group_I = pd.factorize(items["group"])[0]
        self.units = units_drawn(group_I)
        rng = np.random.default_rng([seed, *corpus.encode()])  # of both metrics the same windows
        self._weights_RI = resample(group_I, resamples, rng) * self.weight_I

    def estimate(self, **share: float) -> Estimate:
        """Of the sum over rules of share x damage."""
        value_I = sum(
            (factor * self.values[rule].to_numpy() for rule, factor in share.items()), np.zeros(len(self.values))
        )
        value_R = self._weights_RI @ value_I / self._weights_RI.sum(axis=1)
        return mean_interval(float(np.average(value_I, weights=self.weight_I)), value_R, self.units)

    def worth(self, **share: float) -> Estimate:
        """Of the sum over rules of share x B(rule)."""
        return self.estimate(all_low=sum(share.values()), **{rule: -factor for rule, factor in share.items()})


def damages(study: Study, measured: Sequence[Measured], *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """POSITION: what every rule does to every model on every corpus."""
    rows = []
    for model in measured:
        for corpus in study.corpora:
            for metric in METRICS:
                damage = Damage(model.responses, corpus, metric, resamples=resamples, seed=seed)
                for rule in study.rules:
                    found = damage.estimate(**{rule: 1.0})
                    place = {"model": model.name, "blocks": model.sheet.blocks, "rule": rule, "corpus": corpus}
                    place |= {"metric": metric, "nbytes": model.nbytes[rule], "n": damage.units}
                    rows.append(place | {"value": found.value, "lo": found.lo, "hi": found.hi})
    return pd.DataFrame(rows)[POSITION.names]


def criteria(
    study: Study,
    measured: Sequence[Measured],
    skipped: Mapping[str, str] = MappingProxyType({}),
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """CRITERIA: what was claimed of positions, and the verdict on each claim. `skipped`: model -> why it is left out.

    `met` and `not met` are said where the whole interval lies on that side, `open` where it does not; `not run` has its
    reason. A claim about several models is about the least of their values, whose interval allows for their number.
    """
    rows: list[Row] = []
    early: dict[tuple[str, str, str], list[Row]] = {}
    for model in measured:
        for corpus in study.corpora:
            for metric in METRICS:
                damage = Damage(model.responses, corpus, metric, resamples=resamples, seed=seed)
                early[model.name, corpus, metric] = list(_early(study, damage, model.name, corpus, metric))
        rows += [row for metric in METRICS for row in early[model.name, study.corpora[0], metric]]
    home = {model.name: early[model.name, study.corpora[0], KL] for model in measured}
    rows.append(_persists(study, measured, home))
    rows.append(_generalises(study, measured, home))
    away = [
        row
        for (_, corpus, metric), some in early.items()
        if corpus != study.corpora[0] and metric == KL
        for row in some
    ]
    rows.append(_every("holds off home", away, f"off {study.corpora[0]}", "the study has one corpus"))
    for model in measured:
        rows += [*_real(study, model), *_faster(study, model)]
    for name, why in skipped.items():
        rows.append(_row({"criterion": "every", "model": name, "corpus": "", "metric": ""}, why=why))
    return pd.DataFrame(rows)[CRITERIA.names]


def _early(study: Study, damage: Damage, model: str, corpus: str, metric: str) -> Iterator[Row]:
    """Early MLPs are worth more than twice as much as middle and as late ones; and anything at all."""
    for rival in RIVALS:
        place = {"criterion": f"early > 2 x {rival}", "model": model, "corpus": corpus, "metric": metric}
        if lacking := {"early", rival, "all_low"} - set(study.rules):
            yield _row(place, why=f"the study has no rule {min(lacking)}")
            continue
        found, own, other = damage.worth(early=1, **{rival: -2}), damage.worth(early=1), damage.worth(**{rival: 1})
        verdict = above(found, 0.0)
        if verdict == MET and own.lo <= 0:  # middle MLPs that do harm would make it true of early ones that do nothing
            verdict = OPEN if own.hi > 0 else NOT_MET
        ratio = f"B(early) {own.value:.2g}, B({rival}) {other.value:.2g}"
        yield _row(place, found, damage.units, comparison="> 0", verdict=verdict, why=ratio)


def _persists(study: Study, measured: Sequence[Measured], home: Mapping[str, Sequence[Row]]) -> Row:
    blocks = sorted({model.sheet.blocks for model in measured})
    rows = [row for some in home.values() for row in some]
    reason = ""
    if study.kind != "scale":
        reason = "the models differ in more than their size"
    elif len(blocks) < 2:
        reason = "fewer than two depths ran"
    told = f"{min(blocks)} to {max(blocks)} blocks" if blocks else ""
    return _every("persists with scale", [] if reason else rows, told, reason)


def _generalises(study: Study, measured: Sequence[Measured], home: Mapping[str, Sequence[Row]]) -> Row:
    others = [model.name for model in measured if model.sheet.family != "gpt2"]
    rows = [row for name in others for row in home[name]]
    reason = "" if others else "every model that ran is a GPT-2"
    return _every("generalises to other architectures", rows, ", ".join(others), reason)


def _every(criterion: str, rows: Sequence[Row], told: str, reason: str) -> Row:
    """One claim from several: the least value, its interval that of the minimum by Bonferroni (all hold at once)."""
    place = {
        "criterion": criterion,
        "model": "all",
        "corpus": told if criterion.startswith("holds") else "",
        "metric": KL,
    }
    run = [row for row in rows if row["verdict"] != NOT_RUN]
    if not run:
        return _row(place, why=reason or "nothing was measured")
    half = [float(stdtrit(row["df"], 1 - 0.025 / len(run))) * row["deviation"] for row in run]
    lo, hi = (min(row["value"] + sign * each for row, each in zip(run, half, strict=True)) for sign in (-1, 1))
    found = Estimate(min(row["value"] for row in run), lo, hi, math.nan, math.nan)
    verdicts = [row["verdict"] for row in run]
    verdict = above(found, 0.0)
    if verdict == MET and set(verdicts) != {MET}:
        verdict = OPEN
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in (MET, OPEN, NOT_MET) if word in verdicts)
    why = f"the least of {len(run)}: {counts}" + (f" ({told})" if told else "")
    return _row(place, found, len(run), comparison="> 0", verdict=verdict, why=why)


def _real(study: Study, model: Measured) -> Iterator[Row]:
    """Real INT8, in packed codes or by another library's rounding, loses less than `MARGIN` on the worst corpus."""
    place = {"criterion": "real INT8 loses nothing", "model": model.name, "corpus": "", "metric": RATIO}
    for row, own, n in _ran(study, model, "all_low", place):
        if row is None:
            yield own
            continue
        found = Estimate(row["loss_nats_per_token"], row["loss_lo"], row["loss_hi"], math.nan, math.nan)
        verdict = below(found, MARGIN)
        why = f"nats a token above simulated, on {row['task'].partition('/')[0]}"
        yield _row(own, found, n, comparison=f"< {MARGIN:g}", verdict=verdict, why=why)


def _faster(study: Study, model: Measured) -> Iterator[Row]:
    """The champion, its codes packed, reads more tokens a second than the model it was made from."""
    place = {"criterion": "champion faster than FP16", "model": model.name, "corpus": "", "metric": "speedup"}
    for row, own, n in _ran(study, model, "champion", place):
        if row is None:
            yield own
            continue
        found = Estimate(row["speedup"], row["speedup_lo"], row["speedup_hi"], math.nan, math.nan)
        share = model.nbytes["champion"] / model.nbytes["all_high"] if "all_high" in model.nbytes else math.nan
        why = f"times as fast, with {share:.0%} of the bytes"
        yield _row(own, found, n, comparison="> 1", verdict=above(found, 1.0), why=why)


def _ran(study: Study, model: Measured, rule: str, place: Row) -> Iterator[tuple[Row | None, Row, int]]:
    """(row of BACKENDS, place, windows) of each backend that ran a rule, on the corpus where it lost most.

    Where it did not run: (None, the finished row with the reason, 0).
    """
    backends = model.backends[model.backends["plan"] == rule]
    if backends.empty:
        why = f"the study's low precision is {study.low}" if rule in study.rules else f"the study has no rule {rule}"
        yield None, _row(place, why=why), 0
    for name, rows in backends.groupby("backend", sort=False):
        own = place | {"criterion": f"{place['criterion']} ({name})"}
        if rows["loss_hi"].isna().all():
            yield None, _row(own, why=rows["status"].iloc[0]), 0
            continue
        worst = rows.loc[rows["loss_hi"].idxmax()].to_dict()
        asked = model.responses[model.responses["task"] == worst["task"]]
        yield worst, own, asked["item"].nunique()


def _row(
    place: Row,
    found: Estimate | None = None,
    n: int = 0,
    *,
    comparison: str = "",
    verdict: str = NOT_RUN,
    why: str = "",
) -> Row:
    value, lo, hi = (found.value, found.lo, found.hi) if found else (math.nan,) * 3
    known = {"deviation": found.deviation, "df": found.df} if found else {}
    return {
        **place,
        **known,
        "value": value,
        "lo": lo,
        "hi": hi,
        "n": n,
        "comparison": comparison,
        "verdict": verdict,
        "why": why,
    }


# ---- one command: the plan of a rule for any depth -----------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the precision map of a rule; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m bitalloc.position", description=main.__doc__)
    parser.add_argument("model", help="a number of blocks, or a model of config/models.yaml; no weights are needed")
    parser.add_argument("--rule", default="early", help=f"one of {', '.join(RULES)}; default: early")
    parser.add_argument("--high", default="fp16", help="precision of what the rule keeps")
    parser.add_argument("--low", default="int8", help="precision of all else")
    given = parser.parse_args(arguments)
    try:
        blocks = (
            int(given.model) if given.model.isdigit() else load(Path("config/models.yaml")).model(given.model).blocks
        )
        plan = position(given.rule, blocks, high=given.high, low=given.low)
    except BitallocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(plan, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
