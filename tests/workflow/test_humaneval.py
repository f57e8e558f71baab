"""HumanEval through the workflow: what is written, what is executed, and only when it is asked for."""

import gzip
import json

import pytest

from bitalloc import tables
from tests.test_sandbox import contained

from .conftest import Project

pytestmark = pytest.mark.workflow

PROBLEM = {
    "prompt": "def same(x):\n    ''' x itself. '''\n    return x\n",  # right whatever follows, if it can be read
    "entry_point": "same",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}


@pytest.fixture(scope="module")
def humaneval(tmp_path_factory) -> dict:
    source = tmp_path_factory.mktemp("humaneval") / "problems.jsonl.gz"
    rows = [json.dumps({"task_id": f"Test/{n}", **PROBLEM}) for n in range(3)]
    source.write_bytes(gzip.compress("\n".join(rows).encode()))
    return {"sources": [str(source)], "max_new_tokens": 4}


@pytest.fixture(scope="module")
def written(finished, humaneval, tmp_path_factory) -> Project:
    """What the unquantised model writes; nobody has asked for its execution."""
    project = finished.copy(tmp_path_factory.mktemp("written") / "project")
    project.configure(humaneval=humaneval)
    status, output = project.run("results/tiny/humaneval/reference.samples.parquet")
    assert status == 0, output
    return project


def test_samples_are_written_and_not_executed(written):
    folder = written.folder / "results/tiny/humaneval"
    assert len(tables.SAMPLES.read(folder / "reference.samples.parquet")) == 3
    status, output = written.run("results/tiny/humaneval/reference.parquet")
    assert status != 0
    assert any("humaneval.execute is off" in line and "execute: true" in line for line in output.splitlines())
    assert [path.name for path in folder.iterdir()] == ["reference.samples.parquet"]


@contained
def test_every_checkpoint_and_the_reference_are_scored(written, humaneval, tmp_path):
    project = written.copy(tmp_path / "project")
    project.configure(humaneval={**humaneval, "execute": True})
    status, output = project.run("results/tiny/humaneval.parquet")
    assert status == 0, output
    results = project.folder / "results/tiny"
    scores = tables.HUMANEVAL.read(results / "humaneval.parquet").set_index("plan")
    assert set(scores.index) == {"best-2.55bpw", "reference"}
    assert (scores["n"] == 3).all()
    assert tables.verdicts(results / "humaneval.parquet") == tables.verdicts(results / "checkpoints.parquet")
    # how long a program may take is no matter for what was written
    project.configure(humaneval={**humaneval, "execute": True, "timeout_s": 20.0})
    status, output = project.run("results/tiny/humaneval.parquet", "-n")
    assert "humaneval_execute" in output
    assert "humaneval_generate" not in output
