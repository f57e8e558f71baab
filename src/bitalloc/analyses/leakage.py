"""Leakage, in place of adversarial Goodhart: what a search claims that has seen the windows it is reported on."""

from __future__ import annotations

from bitalloc.analyses.study import BEST, LEAKED, Study


def leakage(study: Study) -> None:
    """Lead of `leaked` over `best` of the same bytes, corpus by corpus (`lead_nats`) and task by task (`lead_points`).

    The search of `leaked` saw the report windows: a lead there that neither the tasks nor other texts confirm is worth
    nothing, and says how far a report that was optimised for would mislead.
    """
    leaked, best = study.plan_of(LEAKED), study.plan_of(BEST)
    for budget in leaked.index.intersection(best.index):
        pair = [leaked[budget], best[budget]]
        for name in study.sets:
            sample = study.sample(name, pair)
            if name.startswith("nll:"):  # lower is better
                place = {"gold": f"ppl:{name.removeprefix('nll:')}", "statistic": "lead_nats", "scale": -1.0}
            elif name in study.golds:
                place = {"gold": name, "statistic": "lead_points", "scale": 100.0}
            else:
                continue
            found = sample.difference(*pair)
            study.add_estimate("leakage", found=found, proxy=LEAKED, budget=str(budget), n=sample.n, **place)
