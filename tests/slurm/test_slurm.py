"""profiles/slurm against a real slurmctld and slurmd; `make test-slurm` runs it, on a machine that it may set up."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bitalloc import tables

from ..workflow.conftest import ROOT, TARGETS, Project
from .cluster import cluster, install, jobs, squeue

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("BITALLOC_SLURM") != "1", reason="installs Slurm and runs its daemons: `make test-slurm` does"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason="pip install 'bitalloc[slurm]'; merely installed it slows every start of snakemake",
    ),
]
QUICK = ["--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"]
TOY = """
rule all:
    input: "good", "flaky", "long"

rule good:
    output: "good"
    resources: gpu=2
    shell: "echo $SLURM_JOB_ID >{output}"

rule flaky:
    output: "flaky"
    shell: "echo {resources.mem_mb} >>attempts; test $(wc -l <attempts) -gt 1; touch {output}"

rule long:
    output: "long"
    shell: "echo $SLURM_JOB_ID >>begun; sleep $(test $(wc -l <begun) -gt 1 && echo 1 || echo 600); touch {output}"
"""


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    if reason := install():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture
def toy(tmp_path) -> Path:
    (tmp_path / "Snakefile").write_text(TOY)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", *arguments, "--profile", "profiles/slurm", *QUICK]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.2)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_a_job_that_fails_and_one_that_somebody_cancels_are_tried_again(toy):
    run = start(toy)
    wait_for(lambda: lines(toy / "begun"), run)
    subprocess.run(["scancel", lines(toy / "begun")[0]], check=True)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert lines(toy / "attempts") == ["8000", "16000"]  # and more memory the second time
    assert len(lines(toy / "begun")) == 2
    asked = Counter(job.get("TresPerJob", job.get("TresPerNode", "no GPU")) for job in jobs())
    assert asked == {"gres:gpu:2": 1, "no GPU": 4}
    assert not squeue()


def test_ctrl_c_cancels(toy):
    run = start(toy)
    wait_for(lambda: lines(toy / "begun"), run)
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode != 0
    end = time.monotonic() + 30
    while squeue():
        assert time.monotonic() < end, squeue()
        time.sleep(0.2)


def test_the_tiny_chain_end_to_end_and_only_gpu_jobs_ask_for_a_gpu(tmp_path):
    project, before = Project(tmp_path), {job["JobId"] for job in jobs()}
    sheet = tmp_path / "config/models.yaml"
    sheet.write_text(sheet.read_text().replace("device: cpu", "device: auto"))
    run = start(tmp_path, *TARGETS)
    output, _ = run.communicate(timeout=1500)
    assert run.returncode == 0, output[-5000:]
    assert (tmp_path / "results/tiny/goodhart.png").stat().st_size > 20_000
    checkpoints = tables.CHECKPOINTS.read(project.tables()["checkpoints.parquet"])
    assert (checkpoints["nbytes"] == checkpoints["predicted_nbytes"]).all()
    asked = {"gpu": set(), "no gpu": set()}
    for job in jobs():
        if job["JobId"] not in before:
            rule = re.search("rule_([a-z_]+)", job["StdOut"])[1]
            asked["gpu" if "gpu" in job.get("TresPerJob", "") + job.get("TresPerNode", "") else "no gpu"].add(rule)
    assert asked["gpu"] >= {"calibrate", "sweep", "sweep_sensitivity", "evaluate", "compress"}
    assert asked["no gpu"] >= {"retrieve_model", "retrieve_corpora", "fit", "allocate", "analyze"}
    assert not asked["gpu"] & asked["no gpu"]
    assert not {"gates", "compress_merge", "report"} & (asked["gpu"] | asked["no gpu"])  # the head does those
