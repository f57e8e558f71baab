"""The executor between snakemake and a workspace that fails: nothing leaked, nothing twice, nothing lost, token kept.

`make bench-clusters` repeats every fault of faults.py at random moments; here run a few that hold most of them.
"""

import json
import os
import signal
import time

import pytest
import yaml

from .faults import FAULTS, Outcome, at_work, count, interrupted
from .project import LIMIT_S, Toy, wait_for
from .standin import TOKEN, Standin


@pytest.fixture
def standin(tmp_path):
    standin = Standin(tmp_path / "standin")
    yield standin
    standin.close()


@pytest.fixture
def toy(tmp_path, standin) -> Toy:
    return Toy(tmp_path / "project", standin)


@pytest.fixture
def single(tmp_path, standin) -> Toy:
    """A workflow of one job, where one is enough."""
    return Toy(tmp_path / "project", standin, jobs=1)


def hold(toy: Toy) -> None:
    """Jobs work on until `release`, so that what is to happen to them finds them at work."""
    (toy.folder / "hold").touch()


def release(toy: Toy) -> None:
    (toy.folder / "hold").unlink()


def test_a_workspace_that_fails_in_every_way_is_survived_and_no_one_learns_the_token(toy, standin):
    hold(toy)
    standin.after_hello = {"storm": 2, "lost": 1, "late": 1}
    with toy.started() as head:
        wait_for(lambda: at_work(toy) and not standin.left("storm", "lost", "late"), head)
        standin.set(garbled=1, storm=3)
        next(iter(standin.jobs.values())).kill("Stopped")
        wait_for(lambda: len(standin.jobs) == 3 and not standin.left("garbled", "storm"), head)
        release(toy)
        status = head.wait(LIMIT_S)
    assert count(toy, status) == Outcome(status=0, leaked=0, doubles=0, lost=0, created=3)  # one was stopped
    assert "looking whether the job was created" in toy.output()
    assert "the API answers again" in toy.output()
    assert not any(TOKEN in text for text in (toy.output(), json.dumps(standin.bodies())))
    written = [path for path in toy.folder.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    [gpu] = {body["spec"]["resource_shape"] for body in standin.bodies()}
    assert gpu == "gpu.a10"


def test_ctrl_c_pressed_thrice_in_an_outage_leaves_no_job(single, standin):
    hold(single)
    with single.started() as head:
        wait_for(lambda: at_work(single), head)
        standin.storm = 3
        for _ in range(3):
            os.killpg(head.pid, signal.SIGINT)
            time.sleep(0.2)
        assert head.wait(LIMIT_S) != 0
    wait_for(lambda: not standin.running())
    assert standin.states() == ["Stopped"]


def test_ctrl_c_while_a_creation_takes_effect_late_leaves_no_job(single, standin):
    hold(single)
    standin.late = 1
    with single.started() as head:
        wait_for(standin.bodies, head)
        os.killpg(head.pid, signal.SIGINT)
        assert head.wait(LIMIT_S) != 0
    assert len(standin.jobs) == 1  # it did come to life, and was found
    wait_for(lambda: not standin.running())


def test_jobs_that_could_not_be_stopped_are_named_and_taken_over_later(single, standin):
    hold(single)
    site = yaml.safe_load((single.folder / "site.yaml").read_text())
    (single.folder / "site.yaml").write_text(yaml.safe_dump({**site, "stop_s": 1}))
    with single.started() as head:
        wait_for(lambda: at_work(single), head)
        standin.refuse = True
        os.killpg(head.pid, signal.SIGINT)
        assert head.wait(LIMIT_S) != 0
    standin.refuse = False
    [line] = [line for line in single.output().splitlines() if "they may still run" in line]
    assert "HTTP 401" in line and all(job in line for job in standin.jobs)
    with single.started() as head:
        wait_for(lambda: "taken over from an earlier run" in single.output(), head)
        release(single)
        status = head.wait(LIMIT_S)
    assert count(single, status) == Outcome(status=0, leaked=0, doubles=0, lost=0, created=1)


def test_killed_and_run_again_it_takes_jobs_over_unless_their_code_has_changed(toy, standin):
    hold(toy)
    with toy.started() as head:
        wait_for(lambda: at_work(toy), head)
        head.kill()
    old = list(standin.jobs)
    text = (toy.folder / "Snakefile").read_text()
    (toy.folder / "Snakefile").write_text(text.replace("code=1", "code=lambda wildcards: 1 + int(wildcards.n)"))
    toy.unlock()
    with toy.started() as head:
        wait_for(lambda: len(standin.jobs) == 3 and "taken over from an earlier run" in toy.output(), head)
        release(toy)
        status = head.wait(LIMIT_S)
    assert count(toy, status) == Outcome(status=0, leaked=0, doubles=0, lost=0, created=3)
    said = toy.output()
    assert f"2 jobs of an earlier run of this folder are alive: {', '.join(old)}" in said
    assert said.count("taken over from an earlier run") == 1
    assert said.count("does this work with other code; stopping it") == 1
    assert [(toy.folder / f"out-{n}").read_text() for n in range(2)] == ["1\n", "2\n"]


def test_a_mount_that_is_not_the_heads_is_one_line_and_not_tried_again(single, standin):
    standin.elsewhere = str(single.folder)
    assert single.run() == 1
    assert len(standin.jobs) == single.jobs
    [line] = {line.strip() for line in single.output().splitlines() if "is not the folder of the head" in line}
    assert f"{single.folder} is not the folder of the head; mount one shared file system" in line


def test_a_token_that_is_refused_is_one_line_and_nothing_begins(single, standin):
    standin.refuse = True
    assert single.run() == 1
    assert "lepton: GET /jobs: HTTP 401, the token is refused; nothing was submitted" in single.output()
    assert "Traceback" not in single.output() and TOKEN not in single.output()
    assert not standin.bodies()


def test_the_bench_knows_what_is_due():
    assert {due for _, due, _ in FAULTS.values()} == {0, 1}
    assert all(callable(run) for run, _, _ in FAULTS.values()) and callable(interrupted)
