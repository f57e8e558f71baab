"""What a cluster asks of the workflow: GPUs where they are used, one shared folder, no limit of this machine."""

import os
import re
import subprocess
import sys

import pytest

from .conftest import Project

pytestmark = pytest.mark.workflow


def planned(output: str) -> dict[str, str]:
    """Rule -> its line of resources in a dry run."""
    found = re.findall(r"^(?:local)?rule (\w+):\n(?:    .*\n)*?    resources: (.*)", output, re.MULTILINE)
    return dict(found)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("cluster"))
    sheet = project.folder / "config/models.yaml"
    sheet.write_text(sheet.read_text().replace("device: cpu", "device: auto"))
    return project


def dry_run(project: Project, *arguments: str) -> str:
    command = [sys.executable, "-m", "snakemake", "results/tiny/sensitivity.parquet", "-n", *arguments]
    return subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=True).stdout


def test_on_a_cluster_gpu_jobs_ask_for_gpus_as_many_as_they_are_told_and_cpu_jobs_for_none(project):
    jobs = planned(dry_run(project, "--profile", "profiles/lepton", "--set-resources", "sweep_sensitivity:gpu=2"))
    gpus = {rule: int(re.search(r"gpu=(\d)", line)[1]) for rule, line in jobs.items()}
    assert gpus == {
        "retrieve_model": 0, "retrieve_corpora": 0, "calibrate": 1, "sweep": 1, "sweep_assemble": 0,
        "sweep_sensitivity": 2,
    }  # fmt: skip
    assert "mem_mb=8000" in jobs["calibrate"] and "runtime=240" in jobs["calibrate"]


def test_on_one_machine_there_is_one_gpu(project):
    jobs = planned(dry_run(project, "--cores", "2", "--set-resources", "sweep_sensitivity:gpu=2"))
    assert "gpu=1" in jobs["sweep_sensitivity"]


def test_a_job_in_another_folder_than_the_heads_is_one_line(project, tmp_path):
    copy = project.copy(tmp_path / "copy")
    (copy.folder / ".snakemake").mkdir(exist_ok=True)
    (copy.folder / ".snakemake/beacon").write_text("of this folder")
    job = ["results/tiny/checkpoint.json", "--mode", "remote", "--nolock", "--cores", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *job], cwd=copy.folder, capture_output=True, text=True, check=False,
        env={**os.environ, "BITALLOC_BEACON": "of the head's folder"},
    )  # fmt: skip
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert f"{copy.folder} is not the folder in which the run was started: all machines must mount" in said
    assert "Traceback" not in said and not (copy.folder / "results/tiny/checkpoint.json").exists()
