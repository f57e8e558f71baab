"""Execute Python that a model wrote: in bubblewrap, or not at all.

A program sees one process, a bare Python with its standard library, a small writable folder in memory and
/dev/null: no network, no environment, no /proc, no home, no other file, no process but its own (namespaces, a
seccomp filter, rlimits, a wall clock). Before anything is executed a probe tries to break out; where it succeeds, or
bubblewrap is absent, everything is refused.

`judge` keeps program and tests apart: each runs in a sandbox of its own, and between them pass arguments and answers
as plain data. The verdict leaves the judge's sandbox beside a nonce that the parent drew. The program never
shares a process, a file or a pipe with tests, verdict or nonce: exiting, printing, patching builtins, walking frames
or returning objects that equal everything cannot fake a pass. What remains: a program that knows the answers (the model
may have been trained on them), and faults of the kernel.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitalloc.errors import BitallocError
from bitalloc.sandbox import inside, seccomp

FOLDER = "/box"  # where a program runs; all it writes is forgotten
_NOTHING = "nothing was executed"

# what a program must not be able to do; says "closed" where it is so
PROBE = """
import os, socket
def refused(attempt):
    try:
        attempt()
    except OSError:
        return True
ways = {
    "fork": os.fork,
    "socket": socket.socket,
    "write": lambda: open("/outside", "w"),
    "proc": lambda: os.listdir("/proc"),
    "files": lambda: open(OURS),
}
print(*[name for name in ways if not refused(ways[name])] or ["closed"])
"""


@dataclass(frozen=True)
class Limits:
    """What one program may take."""

    wall_s: float = 10.0  # with the start of the interpreters, 0.1 s
    memory_nbytes: int = 2**29  # address space
    disk_nbytes: int = 2**24  # of FOLDER, which lies in memory; a file at most a quarter
    output_nbytes: int = 2**16
    open_files: int = 32

    def rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_AS": self.memory_nbytes,
            "RLIMIT_CPU": math.ceil(self.wall_s) + 1,  # the clock comes first
            "RLIMIT_FSIZE": self.disk_nbytes // 4,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": 1,
            "RLIMIT_CORE": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `exited`, `timeout` or `flooded` (it wrote too much); `status` as a shell gives it."""

    ended: str
    status: int
    output: bytes
    wall_s: float


@dataclass(frozen=True)
class Verdict:
    """`passed`; `failed`: an answer is wrong; `error`: it raised, died or gave no plain value; `timeout`."""

    outcome: str
    detail: str
    wall_s: float


def run(program: str, *, limits: Limits | None = None) -> Outcome:
    """Run `program` as a script, stdout and stderr together. Raises `BitallocError` where it cannot be contained."""
    backend()
    return _run(program, limits or Limits())


def judge(program: str, *, prompt: str, test: str, entry_point: str, limits: Limits | None = None) -> Verdict:
    """Does the function `entry_point` of `program` pass `check` of `test`, which may also use what `prompt` defines?

    Arguments and answers are copied: a change that the function makes to its arguments stays with it. Raises
    `BitallocError` when the tests themselves cannot be run, and where the program cannot be contained.
    """
    backend()
    limits, nonce, start = limits or Limits(), secrets.token_hex(16), time.monotonic()
    ask_out, ask_in = os.pipe()  # the judge asks, the candidate tells
    tell_out, tell_in = os.pipe()
    ours = [ask_out, ask_in, tell_out, tell_in]
    job = {"prompt": prompt, "test": test, "entry_point": entry_point, "nonce": nonce}
    with ExitStack() as running:
        try:
            apart = {"role": "candidate", "program": program, "entry_point": entry_point}
            apart |= {"requests": ask_out, "replies": tell_in}
            running.enter_context(_sandboxed(apart, limits, (ask_out, tell_in), stdout=subprocess.DEVNULL))
            job |= {"role": "judge", "requests": ask_in, "replies": tell_out}
            tests = running.enter_context(_sandboxed(job, limits, (ask_in, tell_out)))
        finally:
            for end in ours:  # so that the end of one process is the end of the file for the other
                os.close(end)
        output, ended = _read(tests, start + limits.wall_s, limits.output_nbytes)
    wall_s = time.monotonic() - start
    said = [line.split() for line in output.decode(errors="replace").splitlines() if line.startswith(nonce)]
    if said:
        return Verdict(said[-1][1], " ".join(said[-1][2:]), wall_s)
    if ended == "timeout":
        return Verdict("timeout", "", wall_s)
    last = (output.decode(errors="replace").split("\n")[-2:] or [""])[0][:200]
    raise BitallocError(f"the tests of {entry_point} did not run ({last or 'no word'}); check the data set, then rerun")


@functools.cache
def backend() -> str:
    """What contains the programs, for the record. Raises `BitallocError` unless a probe finds everything closed."""
    bwrap = _bwrap()
    found = _run(f"OURS = {__file__!r}\n{PROBE}", Limits(wall_s=60.0))
    if found.output != b"closed\n":
        reason = " ".join(found.output.decode(errors="replace").split())[:200] or f"{found.ended}, {found.status}"
        raise BitallocError(
            f"bubblewrap cannot contain a program here ({reason}), {_NOTHING}; allow user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0), take "
            "bubblewrap 0.8 or later, or execute elsewhere"
        )
    version = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=True, env={}).stdout
    return f"{version.strip()}, seccomp, Python {platform.python_version()}"


def _run(program: str, limits: Limits) -> Outcome:
    start = time.monotonic()
    with _sandboxed({"role": "run", "program": program}, limits) as process:
        deadline = start + limits.wall_s
        output, ended = _read(process, deadline, limits.output_nbytes)
        if ended == "exited":
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                ended = "timeout"
    return Outcome(ended, process.returncode, output, time.monotonic() - start)


@contextmanager
def _sandboxed(
    job: dict[str, Any], limits: Limits, fds: tuple[int, ...] = (), stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen]:
    """A process of its own for `job`, which does not outlive the block, nor this process if that is killed."""
    source = Path(inside.__file__).read_text(encoding="utf-8")
    text = json.dumps({**job, "limits": limits.rlimits()}).encode()
    with _in_memory(text) as stdin, _in_memory(seccomp.program()) as filtered:
        process = subprocess.Popen(
            _command(limits, filtered, source), stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT,
            pass_fds=(filtered, *fds), env={}, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the outer bwrap; the sandbox dies with it, to its last process
        process.wait()
        if process.stdout:
            process.stdout.close()


@contextmanager
def _in_memory(data: bytes) -> Iterator[int]:
    """A descriptor that `data` can be read from, once."""
    descriptor = os.memfd_create("sandbox")
    try:
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(process: subprocess.Popen, deadline: float, most: int) -> tuple[bytes, str]:
    """What the process writes, up to `most` bytes and `deadline`, and why that was the end of it."""
    output, pipe, poll = b"", process.stdout.fileno(), select.poll()
    poll.register(pipe, select.POLLIN)
    while len(output) < most:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            return output, "timeout"
        if not (part := os.read(pipe, most - len(output))):
            return output, "exited"
        output += part
    return output, "flooded"


def _bwrap() -> str:
    if (path := shutil.which("bwrap")) is None:
        raise BitallocError(
            f"no bwrap in PATH: code written by a model is executed in bubblewrap or not at all, {_NOTHING}; "
            "apt-get install bubblewrap"
        )
    return path


@functools.cache
def _python() -> tuple[Path, list[str]]:
    """The interpreter behind any virtual environment, and all that it needs: its library and shared objects."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    library = [Path(path).resolve() for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}]
    library = [path for path in library if path.is_dir() and (path / "os.py").is_file()]
    modules = [str(path) for folder in library for path in folder.glob("lib-dynload/*.so")]
    try:
        linked = subprocess.run(["ldd", python, *modules], capture_output=True, text=True, check=False).stdout
    except OSError:
        raise BitallocError(f"no ldd in PATH to find the libraries of {python}, {_NOTHING}; install libc-bin") from None
    return python, sorted({str(python), *map(str, library), *re.findall(r"(/\S+) \(0x", linked)})


def _command(limits: Limits, filtered: int, source: str) -> list[str]:
    python, files = _python()
    command = [_bwrap(), "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session"]
    command += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--clearenv", "--seccomp", str(filtered)]
    for path in files:
        command += ["--ro-bind", path, path]
        if (packages := Path(path) / "site-packages").is_dir():
            command += ["--size", "4096", "--tmpfs", str(packages), "--remount-ro", str(packages)]
    command += ["--dev-bind", os.devnull, os.devnull, "--size", str(limits.disk_nbytes), "--tmpfs", FOLDER]
    command += ["--remount-ro", "/", "--chdir", FOLDER, "--setenv", "PYTHONHASHSEED", "0"]
    return [*command, str(python), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", source]
