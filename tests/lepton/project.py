"""A toy workflow of a few shell jobs, run by snakemake on the stand-in; what a run has left is counted afterwards."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml

from .standin import Standin

SRC = Path(__file__).parents[2] / "src"
SNAKEFILE = """
rule all:
    input: expand("out-{n}", n=range(JOBS))

rule work:
    output: "out-{n}"
    resources: gpu=1
    params: code=CODE
    shell:
        "echo begin $$ >>trace-{wildcards.n}; sleep SECONDS; while test -e hold; do sleep 0.1; done; "
        "echo {params.code} >{output}"
"""
SITE = {
    "image": "python:3.11",
    "node_group": "my-ng-abcd",
    "mounts": [{"path": "/proj", "from": "node-nfs:my-nfs", "mount_path": "/mnt/proj"}],
    "shapes": [
        {"name": "cpu.small", "gpu": 0, "mem_mb": 4_000},
        {"name": "gpu.a10", "gpu": 1, "mem_mb": 16_000},
        {"name": "gpu.2xa100-80gb", "gpu": 2},
    ],
    "secrets": {"HF_TOKEN": "MY_HF"},
    "timeout_s": 5,
    "pause_s": 0.2,
    "settle_s": 5,  # a creation without an answer takes effect by then: the stand-in's after 1 s
    "stop_s": 60,
}
LIMIT_S = 300.0  # what takes longer hangs; nothing is told by how long it takes


class Toy:
    """A folder with the toy workflow, and snakemake in it."""

    run_s = 6.0  # of an undisturbed run, snakemake's start included

    def __init__(self, folder: Path, standin: Standin, *, jobs: int = 2, seconds: float = 1.0, **site: object) -> None:
        self.folder, self.standin, self.jobs, self.seconds = folder, standin, jobs, seconds
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "site.yaml").write_text(yaml.safe_dump({**SITE, **site}))
        self.write(code=1)

    def write(self, *, code: int) -> None:
        text = SNAKEFILE.replace("JOBS", str(self.jobs)).replace("SECONDS", str(self.seconds))
        (self.folder / "Snakefile").write_text(text.replace("CODE", str(code)))

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable, "-m", "snakemake", "--executor", "lepton", "--lepton-site", "site.yaml", "--jobs", "8",
            "--seconds-between-status-checks", "1", "--latency-wait", "5", "--retries", "2", "--keep-going",
            "--rerun-incomplete", "--scheduler", "greedy", "--workflow-profile", "none", *arguments,
        ]  # fmt: skip

    def environment(self) -> Mapping[str, str]:
        path = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, **self.standin.environment(), "PYTHONPATH": path, "XDG_CACHE_HOME": str(self.folder)}

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen]:
        log = (self.folder / "head.log").open("a")
        process = subprocess.Popen(
            self.command(*arguments), cwd=self.folder, env=self.environment(), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            log.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, *arguments: str, timeout: float = LIMIT_S) -> int:
        with self.started(*arguments) as process:
            return process.wait(timeout)

    def unlock(self) -> None:
        """What has to be done after a `kill -9` of snakemake."""
        subprocess.run(
            self.command("--unlock"), cwd=self.folder, env=self.environment(), capture_output=True, check=False
        )

    def output(self) -> str:
        return (self.folder / "head.log").read_text()

    def missing(self) -> list[int]:
        return [n for n in range(self.jobs) if not (self.folder / f"out-{n}").exists()]


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        assert process is None or process.poll() is None, "snakemake has ended"
        time.sleep(0.02)
