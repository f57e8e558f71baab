"""Faults from outside: killed processes, a clock that goes back, folders that cannot be written."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pandas as pd
import psutil
import pytest

from bitalloc.store import Store

from ..permissions import bound
from .conftest import LIMIT_S, Project

pytestmark = pytest.mark.workflow

UNIT = "results/tiny/sweep/block-000.parquet"
# Python reads a file of this name first: a script waits after its first shard while there is a file `hold`
SITECUSTOMIZE = """
import time
from pathlib import Path

hold = Path("hold").absolute()
if hold.exists():
    from bitalloc.store import Store

    put = Store.put

    def put_and_wait(*args):
        put(*args)
        while hold.exists():
            time.sleep(0.01)

    Store.put = put_and_wait
"""


@pytest.fixture
def unfinished(project, tmp_path, monkeypatch) -> Iterator[Project]:
    """One unit of the sweep is to be made: its table is missing, and the shards of two matrices. Its script waits
    after the first of these for as long as there is a file `hold`.
    """
    rows = pd.read_parquet(project.folder / UNIT)
    store = Store(project.folder / "results/store")
    for key in rows.loc[rows["layer"].str.contains("q_proj|o_proj"), "key"]:
        store.path(key).unlink()
    (project.folder / UNIT).unlink()
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    (project.folder / "hold").touch()
    start, started = project.start, []
    project.start = lambda *arguments: started.append(start(*arguments)) or started[-1]
    yield project
    for run in started:  # what a failed test leaves waiting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def at_work(project: Project) -> tuple[subprocess.Popen, psutil.Process]:
    """Snakemake and its script, which has stored a shard and waits."""
    store, run = project.folder / "results/store", project.start(UNIT)
    before = len(list(store.glob("??/*.json")))
    while len(list(store.glob("??/*.json"))) == before:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    below = psutil.Process(run.pid).children(recursive=True)
    [script] = [process for process in below if any(".sweep.py" in word for word in process.cmdline()[1:2])]
    return run, script


def release(project: Project) -> None:
    (project.folder / "hold").unlink()


def test_a_script_or_snakemake_killed_alone_and_run_again_end_as_if_undisturbed(finished, unfinished):
    run, script = at_work(unfinished)
    status, output = unfinished.run(UNIT)  # two runs at once do not meet
    assert status != 0 and "lock" in output.lower()
    script.kill()
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 1
    assert "died with <Signals.SIGKILL: 9>" in output
    assert not (unfinished.folder / UNIT).exists()

    run, _ = at_work(unfinished)
    run.kill()  # and what it has started goes on
    assert unfinished.run("--unlock")[0] == 0
    again = unfinished.start(UNIT)
    said = ""
    while "another process computes model.layers.0" not in said:
        said += (line := again.stdout.readline())
        assert line, said
    release(unfinished)
    output, _ = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, output
    run.communicate()  # until the orphan has ended too
    ours, theirs = (pd.read_parquet(project.folder / UNIT) for project in (unfinished, finished))
    pd.testing.assert_frame_equal(ours.drop(columns="wall_s"), theirs.drop(columns="wall_s"))
    assert not list(unfinished.folder.rglob("*.tmp"))


def test_tables_of_tomorrow_are_refused(project):
    """They would count as newer than what they are made from, though that has changed since."""
    tomorrow = time.time() + 86_400
    for path in (project.folder / "results").rglob("*"):
        os.utime(path, (tomorrow, tomorrow))  # shards too, which nobody minds
    status, output = project.run(UNIT)
    assert status == 1
    assert "are from the future: the clock has gone back" in output and "Traceback" not in output
    command = next(line for line in output.splitlines() if "from the future" in line).rpartition(": ")[2]
    subprocess.run(command, shell=True, cwd=project.folder, check=True)
    assert not list((project.folder / "results/tiny").rglob("*.parquet"))
    assert list((project.folder / "results/store").glob("??/*.json"))


def test_results_that_cannot_be_written_are_one_line(project):
    results = project.folder / "results"
    results.chmod(0o555)
    done = subprocess.run(
        bound(sys.executable, "-m", "snakemake", UNIT, "--cores", "2"),
        cwd=project.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    results.chmod(0o755)
    assert done.returncode == 1
    assert f"cannot write {results}; fix permissions" in done.stderr and "Traceback" not in done.stderr
