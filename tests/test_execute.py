"""Execution: off unless switched on, every outcome by its name, and a judge that is right about the real problems."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from bitalloc import sandbox
from bitalloc.config import HumanEval
from bitalloc.errors import BitallocError
from bitalloc.execute import execute, score
from bitalloc.statistics import share_interval
from bitalloc.tables import HUMANEVAL, OUTCOMES
from tests.test_sandbox import contained

ON = HumanEval(execute=True, timeout_s=5.0)
COMPLETIONS = {
    "passed": "    return x + 1\n",
    "failed": "    return x\n",
    "error": "    return y\n",
    "timeout": "    import time\n    time.sleep(600)\n",
    "unfit": "",
}


def samples(plan: str = "reference", names=tuple(COMPLETIONS)) -> pd.DataFrame:
    rows = [
        {
            "plan": plan,
            "task_id": f"Test/{n}",
            "prompt": "def add(x):\n    ''' One more. '''\n",
            "completion": COMPLETIONS[name],
        }
        | {"entry_point": "add", "test": "def check(f):\n    assert f(1) == 2\n", "prompt_tokens": 4}
        | {"completion_tokens": 5, "truncated": name == "failed", "unfit": name == "unfit"}
        for n, name in enumerate(names)
    ]
    return pd.DataFrame(rows)


def test_off_by_default_and_then_not_even_the_sandbox_is_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox, "backend", None)
    monkeypatch.setattr(sandbox, "judge", None)
    with pytest.raises(BitallocError, match=r"humaneval.execute is off.*execute: true") as error:
        execute(samples(), HumanEval(), workers=1)
    assert "\n" not in str(error.value)


def test_without_a_sandbox_nothing_is_executed(monkeypatch, tmp_path):
    sandbox.backend.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox, "judge", None)
    with pytest.raises(BitallocError, match="apt-get install bubblewrap"):
        execute(samples(), ON, workers=1)
    sandbox.backend.cache_clear()


@contained
def test_every_outcome_has_its_name(tmp_path):
    outcomes = execute(samples(), ON, workers=2)
    OUTCOMES.write(outcomes, tmp_path / "outcomes.parquet")
    assert outcomes["outcome"].tolist() == list(COMPLETIONS)
    assert outcomes["passed"].tolist() == [True, False, False, False, False]
    assert outcomes["detail"].tolist() == ["", "AssertionError", "NameError", "", ""]
    assert set(outcomes["sandbox_backend"]) == {sandbox.backend()}


def outcomes(**passed: list[bool]) -> pd.DataFrame:
    rows = [
        {"plan": plan, "task_id": f"Test/{n}", "passed": yes, "outcome": "passed" if yes else "timeout", "detail": ""}
        | {"truncated": False, "sandbox_backend": "one", "wall_s": 0.1}
        for plan, of_plan in passed.items()
        for n, yes in enumerate(of_plan)
    ]
    return pd.DataFrame(rows)


def test_scores(tmp_path):
    scores = score(outcomes(best=[True, True, False, False], reference=[True, True, True, False]), ON)
    HUMANEVAL.write(scores, tmp_path / "humaneval.parquet")
    best, reference = scores.to_dict("records")
    assert (best["value"], reference["value"], best["n"], best["timeouts"]) == (0.5, 0.75, 4, 2)
    assert best["stderr"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert best["lo"] < 0.5 < best["hi"]
    assert set(scores["status"]) == {"ok"}


def test_nothing_is_claimed_where_the_reference_solves_nothing():
    scores = score(outcomes(best=[True, False], reference=[False, False]), ON)
    assert set(scores["status"]) == {"floor"}
    assert scores.set_index("plan").loc["reference", "hi"] > 0
    with pytest.raises(BitallocError, match="reference"):
        score(outcomes(best=[True]), ON)


@pytest.mark.parametrize(("c", "n"), [(0, 164), (1, 164), (80, 164), (164, 164)])
def test_the_interval_is_scipys(c, n):
    theirs = binomtest(c, n).proportion_ci(method="wilson")
    assert share_interval(c / n, 0.0, n) == pytest.approx((theirs.low, theirs.high), abs=1e-7)


@pytest.mark.data
@pytest.mark.skipif("BITALLOC_DATA" not in os.environ, reason="BITALLOC_DATA is not set")
@contained
@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_the_judge_is_right_about_real_problems(kind):
    """A sample of 40; docs/LOG.md has all 164."""
    with gzip.open(Path(os.environ["BITALLOC_DATA"]) / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def judge(row: dict) -> str:
        body = row["canonical_solution"] if kind == "right" else "    return None\n"
        given = {name: row[name] for name in ("prompt", "test", "entry_point")}
        return sandbox.judge(row["prompt"] + body, **given, limits=sandbox.Limits(wall_s=60.0)).outcome

    chosen = np.random.default_rng(0).choice(len(rows), 40, replace=False)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(judge, [rows[place] for place in chosen]))
    assert set(found) == {"passed" if kind == "right" else "failed"}
