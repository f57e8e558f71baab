import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bitalloc import tables
from bitalloc.documents import notebook
from bitalloc.errors import BitallocError
from tests.simulated import empty, gates, simulate

SOURCE = (Path(__file__).parents[2] / "workflow/notebooks/goodhart.py").read_text()
INSTALLED = all(map(find_spec, ("nbclient", "ipykernel")))
needs_extra = pytest.mark.skipif(not INSTALLED, reason=notebook.REMEDY)


def study(folder):
    """A small study whose analysis has one row of each of two kinds, one of them never seen before."""
    results = simulate(pool=3, items=30, budgets=("2.6bpw", "3.3bpw"))
    place = {"proxy": "nll:world", "gold": "facts", "budget": "all", "value": 0.5, "lo": 0.1, "hi": 0.9, "n": 9}
    rows = [{"analysis": "correlation", "statistic": "spearman"}, {"analysis": "novel", "statistic": "oddness"}]
    goodhart = pd.DataFrame([{**place, **row, "p_adjusted": np.nan, "status": "ok"} for row in rows])
    frames = {tables.PLANS: results.plans, tables.EVALUATE: results.evaluate, tables.GOODHART: goodhart}
    for table, frame in (frames | {tables.GATES: gates()}).items():
        table.write(frame[empty(table, []).columns], folder / f"{table.name}.parquet")


@needs_extra
def test_it_runs_beside_the_tables_of_a_study(tmp_path):
    study(tmp_path)
    book = json.loads(notebook.execute(SOURCE, tmp_path))
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert kinds.count("code") >= 8 and kinds[0] == "markdown"
    told = json.dumps(book)
    assert "image/png" in told and "oddness" in told and "manual_gain" in told
    assert str(tmp_path) not in told and "iopub" not in told


@needs_extra
def test_a_cell_that_fails_is_one_line(tmp_path):
    with pytest.raises(BitallocError, match="a cell of the notebook fails with ZeroDivisionError: division by zero"):
        notebook.execute("# %%\n1 / 0\n", tmp_path)


def test_without_the_extra_the_remedy_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BitallocError, match=r"pip install 'bitalloc\[notebook\]'"):
        notebook.execute(SOURCE, tmp_path)


def test_every_cell_of_code_parses():
    found = notebook.cells(SOURCE)
    assert len(found) > 15
    for kind, text in found:
        if kind == "code":
            compile(text, "cell", "exec")
