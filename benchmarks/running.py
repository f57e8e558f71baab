"""What the benchmarks that run other tools share: an environment for each, and one measurement for all.

Imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class FailedError(Exception):
    """A command did not do its work; the message is one line that says why."""


class Took(NamedTuple):
    """CPU seconds of a process and of all that it started and waited for; its wall time; the largest resident set."""

    cpu_s: float
    wall_s: float
    peak_mem_mb: int

    def __add__(self, other: Took) -> Took:  # type: ignore[override]
        return Took(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s, max(self.peak_mem_mb, other.peak_mem_mb))


def pinned(text: str) -> list[str]:
    """The requirements of a file, without its comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def environment(folder: Path, peer: str) -> Path:
    """The Python of that peer's environment, made where missing; raises `FailedError` where that cannot be done."""
    requirements, home = HERE / f"peers/{peer}.txt", folder / peer
    python, ready = home / "bin/python", home / "ready.txt"
    wanted = requirements.read_text()
    if ready.is_file() and pinned(ready.read_text()) == pinned(wanted):
        return python
    print(f"{peer}: making {home}, which takes minutes", flush=True)
    # torch first and by itself, as the platform offers it, so that nothing else chooses its build
    torch_first = next(line for line in pinned(wanted) if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    shutil.rmtree(home, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [*pip, torch_first],
        [*pip, "--requirement", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["?"]
            raise FailedError(f"no environment ({said[-1].strip()}); run again with a network")
    ready.write_text(wanted)
    return python


def threaded(threads: int, *, ours: bool) -> dict[str, str]:
    """The environment variables of a command; the peers must not see this project's code."""
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if not ours:
        environ.pop("PYTHONPATH", None)
    return environ


def timed(
    command: list[str], *, log: Path, environ: Mapping[str, str], limit_s: float, cwd: Path | None = None
) -> Took:
    """Run the command with its output in `log`; it and all that it started are killed after `limit_s`.

    Raises `FailedError` with the last line of the log. A small process stands between (`timed.py`): of a child the
    kernel never tells a smaller resident set than its parent had, and this one may hold a model.
    """
    report = log.with_suffix(".took.json")
    report.unlink(missing_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-S", str(HERE / "timed.py"), str(report), *command],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=dict(environ), cwd=cwd, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise FailedError(f"not done after {limit_s:.0f} s; give it more with --limit") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(report.read_text()) if report.is_file() else {"status": process.returncode}
    if status := found.pop("status"):
        raise FailedError(f"ended by {signal.Signals(-status).name}" if status < 0 else last_line(log))
    return Took(**found)


def last_line(log: Path) -> str:
    """What a log ends with; of a progress bar only its last state."""
    lines = [line.rpartition("\r")[2].strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "it said nothing")
