"""Does the proxy rank the plans as the gold does, and does it still near the reference?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from bitalloc.analyses.study import ALL, MIN_PLANS, REFERENCE, Study
from bitalloc.statistics import fisher_interval, reliability
from bitalloc.statistics.ranks import unit_ranks, unit_signs

VARIANTS = ("plans", "items", "both")  # what a bootstrap draws anew
PAIRS = 1 << 22  # of plans, over all resamples, that Kendall's tau may hold for a score


def correlation(study: Study) -> None:
    """Spearman's rho and Kendall's tau over the plans of a stratum, and their means over the strata.

    Plans are resampled within their stratum, items and windows over all of them (`two_way`). `spearman_near` takes
    the half of the plans with the smallest KL (without KL: loss), where a correlation over a wide cohort may hide
    that there is none (the silent zone). `reliability` of the gold says what any proxy could reach there.
    """
    measures = {"spearman": unit_ranks, "kendall": unit_signs}
    strata = {budget: _Stratum(study, budget, names) for budget, names in study.strata.items()}
    near = {budget: _Stratum(study, budget, _nearest(study, names)) for budget, names in study.strata.items()}
    for statistic, unit, places in (
        *((name, unit, strata) for name, unit in measures.items()),
        ("spearman_near", unit_ranks, near),
    ):
        pooled: dict[tuple[str, str], list[tuple]] = {
            pair: [] for pair in itertools.product(study.proxies, study.golds)
        }
        for budget, stratum in places.items():
            for (proxy, gold), members in pooled.items():
                value, found_VR = stratum.correlation(proxy, gold, unit)
                found = (value, found_VR, len(stratum.names))
                _row(study, statistic, [found], proxy=proxy, gold=gold, budget=budget)
                if len(stratum.names) >= MIN_PLANS and np.isfinite(value):
                    members.append(found)
            stratum.ranks.clear()
        for (proxy, gold), members in pooled.items():
            _row(study, statistic, members, proxy=proxy, gold=gold, budget=ALL)
    _reliabilities(study, {"reliability": strata, "reliability_near": near})


def _row(study: Study, statistic: str, strata: list[tuple], **place: str) -> None:
    row: dict[str, Any] = {**place, "n": sum(n for *_, n in strata)}
    value = float(np.mean([value for value, *_ in strata])) if strata else np.nan
    if row["n"] >= MIN_PLANS:
        fewest = min(found_VR.shape[1] for _, found_VR, _ in strata)  # larger strata may have had fewer resamples
        found_VR = np.mean([found_VR[:, :fewest] for _, found_VR, _ in strata], axis=0)
        row["lo"], row["hi"] = fisher_interval(value, *found_VR, n=row["n"])
    elif study.status(place["gold"], place["budget"]) == "ok":
        row["status"] = "too_few"
    study.add("correlation", statistic, value, **row)


def _nearest(study: Study, names: list[str]) -> list[str]:
    """The half of the plans that depart least from the reference."""
    measure = study.proxies.get("kl", study.proxies[study.perplexity])
    distance_P = measure.means(names)
    if "kl" not in study.proxies and REFERENCE in study.nll[study.perplexity.removeprefix("nll:")].plans:
        distance_P = np.abs(distance_P - measure.means([REFERENCE]))
    return [names[place] for place in sorted(np.argsort(distance_P, kind="stable")[: (len(names) + 1) // 2])]


class _Stratum:
    """Ranks of every score over some plans: as measured, and in the three bootstraps. One ranking serves all pairs."""

    def __init__(self, study: Study, budget: str, names: list[str]) -> None:
        self.study, self.names = study, names
        self.drawn_RP = study.drawn(budget, len(names), of=f"{len(names)} plans")
        self.ranks: dict[tuple[str, Callable], tuple[np.ndarray, list[np.ndarray]]] = {}

    def correlation(self, proxy: str, gold: str, unit: Callable) -> tuple[float, np.ndarray]:
        """The measure, and its bootstraps [V, R]."""
        if len(self.names) < 2:
            return np.nan, np.full((len(VARIANTS), self.study.settings.resamples), np.nan)
        (point, ranked), (point_gold, ranked_gold) = self._ranked(proxy, unit), self._ranked(gold, unit)
        found = [np.einsum("rk,rk->r", a, b) for a, b in zip(ranked, ranked_gold, strict=True)]
        return float(point[0] @ point_gold[0]), np.stack([np.broadcast_to(each, found[-1].shape) for each in found])

    def _ranked(self, name: str, unit: Callable) -> tuple[np.ndarray, list[np.ndarray]]:
        if (name, unit) not in self.ranks:
            self.ranks[name, unit] = self._rank(name, unit)
        return self.ranks[name, unit]

    def _rank(self, name: str, unit: Callable) -> tuple[np.ndarray, list[np.ndarray]]:
        study = self.study
        scores = study.proxies[name] if name in study.proxies else study.pooled[name]
        point_P = scores.means(self.names)
        if name in study.proxies:
            items_RP = study.proxies[name].resampled(self.names, study.settings.resamples)
        else:
            items_RP = study.pooled[name].resampled(self.names)
        drawn = (point_P[self.drawn_RP], items_RP, np.take_along_axis(items_RP, self.drawn_RP, 1))
        # all pairs of plans in every resample would not fit in memory; fewer resamples still give the deviation
        few = max(200, PAIRS // max(1, len(self.names) ** 2 // 2)) if unit is unit_signs else None
        return unit(point_P[None]), [unit(each[:few]).astype(np.float32) for each in drawn]


def _reliabilities(study: Study, kinds: dict[str, dict[str, _Stratum]]) -> None:
    """Split halves of the gold's items; the mean over the strata whose plans are enough."""
    for gold, sample in ((gold, study.pooled[gold]) for gold in study.golds):
        half_FI = study.halves(gold, sample)
        for statistic, strata in kinds.items():
            found = {
                budget: (reliability(sample.scores.of(stratum.names), half_FI), len(stratum.names))
                for budget, stratum in strata.items()
                if len(stratum.names) >= MIN_PLANS
            }
            told = [value for value, _ in found.values() if np.isfinite(value)]
            if told:
                found[ALL] = (float(np.mean(told)), sum(n for _, n in found.values()))
            for budget, (value, n) in found.items():
                study.add("correlation", statistic, value, proxy=ALL, gold=gold, budget=budget, n=n)
