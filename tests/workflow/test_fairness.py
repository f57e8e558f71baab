"""Fairness in the DAG: from parallel text to the plan for the worst-off language, and a strategy that asks for it."""

import pandas as pd
import pytest

from bitalloc import tables

pytestmark = pytest.mark.workflow
SMALL = {"languages": ["en", "zh"], "sentences": 48, "pairs": 1, "seeds": 2}


def test_sets_and_plans_are_compared_by_language_within_their_bytes(project):
    project.configure(fairness=SMALL)
    status, output = project.run("results/tiny/fairness.png")
    assert status == 0, output
    results = project.folder / "results/tiny"
    table = tables.FAIRNESS.read(results / "fairness.parquet")
    arms = pd.concat(tables.ARMS.read(results / f"fairness/{name}.parquet") for name in ("arms", "plans.arms"))
    assert set(table["budget"]) == {"as L0 + L9 + L11", "2.55bpw"}
    limits = arms.drop_duplicates("budget").set_index("budget")["budget_nbytes"]
    sets = table[table["budget"] == "as L0 + L9 + L11"].dropna(subset="nbytes")
    assert (sets["nbytes"] <= limits["as L0 + L9 + L11"]).all()
    plans = tables.PLANS.read(results / "fairness/plans.parquet")
    assert (plans["nbytes"] <= limits["2.55bpw"]).all()
    assert {"uniform", "optimal", "fair", "english", "random"} == set(plans["strategy"])
    for budget, rows in table[table["metric"] == "worst_rel_over_fair"].groupby("budget"):
        assert rows.set_index("arm").at["fair", "value"] == 0, budget
    assert {row["gate"] for row in tables.verdicts(results / "fairness.parquet")} == {"sweep", "fit", "fairness"}
    claims = tables.CRITERIA.read(results / "fairness/criteria.parquet")
    assert {"met", "not met", "open"} >= set(claims.loc[claims["value"].notna(), "verdict"])
    assert claims["criterion"].str.startswith("packed codes lose nothing").any()
    status, output = project.run("results/tiny/fairness.png", "--dry-run")
    assert status == 0 and "Nothing to be done" in output

    project.configure(fairness=SMALL, allocate={"strategies": ["uniform", "optimal", "fair"]})
    status, output = project.run("results/tiny/candidates.parquet")
    assert status == 0, output
    assert "fair-2.55bpw" in set(tables.PLANS.read(results / "candidates.parquet")["plan"])
    assert "rule fairness_sensitivity:" not in output  # the table of before serves
