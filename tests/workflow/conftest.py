"""A project folder of its own for every run of the DAG, and one finished small run that tests share."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

# a shell that runs the tests in its background has them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "workflow", "scripts", "config", "resources", "profiles", "envs")
LIMIT_S = 600.0  # what takes longer hangs
TARGETS = ("results/tiny/goodhart.png", "results/tiny/report.md")

# the same chain with few options, windows and plans; every gate check warns that such a small run may fail
SMALL = {
    "threads": 1,  # two take three times the CPU seconds in matrices of this size
    "retrieve": {
        "calibrate_windows": 16,
        "select_windows": 4,
        "report_windows": 4,
        "items": {"facts": 24, "keys": 12},
    },
    "sweep": {"bits": [2, 3, 4], "group_sizes": [64], "ranks": [0, 2, 4]},
    "sensitivity": {"signals": ["kl"], "windows": 4},
    "fit": {"resamples": 20, "extra_ranks": []},
    "allocate": {
        "strategies": ["uniform", "optimal", "bits_only", "rank_only", "manual"],
        "budgets": ["2.55bpw"],
        "pool": 2,
        "runners_up": 1,
        "arms": [],
        "format": "bitalloc",
        "fuse": [],
    },
    "compress": {"plans": ["best"]},
    "export": {"formats": ["huggingface", "gguf"]},
    "evaluate": {"resamples": 50, "jobs": 1, "texts": ["docstrings"], "documents": 8},
    "analyze": {"resamples": 50, "folds": 4},
    "gates": {"mode": "warn"},
}


class Project:
    """A copy of the workflow in a folder, with the small settings for `tiny`, and snakemake in it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        for part in PARTS:
            source, target = ROOT / part, folder / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        self.configure(**settings)

    @classmethod
    def at(cls, folder: Path) -> "Project":
        """The project that stands there already."""
        project = object.__new__(cls)
        project.folder = folder
        return project

    def copy(self, folder: Path) -> "Project":
        shutil.copytree(self.folder, folder, copy_function=shutil.copy2)
        return self.at(folder)

    def configure(self, **settings: object) -> None:
        sheet = yaml.safe_load((ROOT / "config/models.yaml").read_text())
        tiny = sheet["models"]["tiny"]["settings"]
        for name, values in (*SMALL.items(), *settings.items()):
            tiny[name] = {**tiny.get(name, {}), **values} if isinstance(values, dict) else values
        (self.folder / "config/models.yaml").write_text(yaml.safe_dump(sheet))

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "2"]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen]:
        """A run that does not outlive the block, nor do its jobs."""
        with self.start(*arguments) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and all output of `snakemake ARGUMENTS`."""
        with self.started(*arguments) as process:
            output, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, output

    def kill_once(self, condition, *arguments: str, by: int = signal.SIGKILL) -> None:
        """Start a run and send `by` to snakemake and all its jobs as soon as `condition()` holds."""
        with self.started(*arguments) as process:
            while not condition():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            os.killpg(process.pid, by)
            process.communicate(timeout=LIMIT_S)
            assert process.returncode != 0

    def tables(self) -> dict[str, Path]:
        results = self.folder / "results/tiny"
        return {str(path.relative_to(results)): path for path in sorted(results.rglob("*.parquet"))}


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Project:
    """A small run of the whole DAG that went through undisturbed: made by the first worker, copied by the others."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _finished(tmp_path_factory.mktemp("finished"))
    shared = tmp_path_factory.getbasetemp().parent / "finished"
    with open(f"{shared}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            _finished(tmp_path_factory.mktemp("finished")).folder.rename(shared)
    return Project.at(shared).copy(tmp_path_factory.mktemp("own") / "finished")


def _finished(folder: Path) -> Project:
    project = Project(folder)
    status, output = project.run(*TARGETS)
    assert status == 0, output
    return project


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A copy of the finished project that a test may change."""
    return finished.copy(tmp_path / "project")
