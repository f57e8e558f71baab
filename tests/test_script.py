"""The glue of the scripts: one line on bad input, a traceback on a fault of ours, a log of both."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitalloc.errors import BitallocError
from bitalloc.script import stage


@pytest.fixture
def job(tmp_path):
    return SimpleNamespace(rule="sweep", log=[str(tmp_path / "log")], wildcards={"model": "tiny"}, threads=1)


def test_bad_input_is_one_line_and_exit_status_one(job, capsys):
    with pytest.raises(SystemExit) as stop, stage(job):
        raise BitallocError("no such thing; make one")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: sweep: no such thing; make one\n"


def test_our_own_fault_keeps_its_traceback(job, tmp_path):
    with pytest.raises(ZeroDivisionError), stage(job):
        _ = 1 / 0
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()


def test_the_log_says_what_ran(job, tmp_path):
    with stage(job):
        pass
    assert '"torch": "2.13.0' in (tmp_path / "log").read_text()


def test_the_log_of_a_job_that_ended_well_says_what_it_took(job, tmp_path):
    with stage(job):
        assert "wall_s" not in json.loads((tmp_path / "log").read_text())  # a kill -9 here leaves no time
    record = json.loads((tmp_path / "log").read_text())
    assert 0 < record["cpu_s"] <= time.process_time()
    assert record["wall_s"] > 0


def test_the_log_of_a_job_that_failed_claims_no_time(job, tmp_path):
    with pytest.raises(SystemExit), stage(job):
        raise BitallocError("no such thing; make one")
    assert "wall_s" not in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_is_one_line(job, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    job.log = [str(tmp_path / "file/log")]
    with pytest.raises(SystemExit), stage(job):
        raise AssertionError("nothing runs without a log")
    assert capsys.readouterr().err.startswith("error: sweep: cannot write")


def test_a_job_has_the_single_files_that_the_configuration_asks_for(job, tmp_path):
    job.input = {"plans": "plans.parquet", "leaked": [], "verdicts": ["a.json", "b.json"]}
    job.output, job.params = ["table.parquet"], SimpleNamespace(settings={"seed": 3}, sheet={"remote_code": False})
    with stage(job) as given:
        assert given.inputs == {"plans": Path("plans.parquet")}
        assert (given.output, given.settings.seed, given.remote_code) == (Path("table.parquet"), 3, False)
