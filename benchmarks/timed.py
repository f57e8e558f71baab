"""python timed.py REPORT.json COMMAND ...: run the command, write what it took (the fields of `running.Took`)."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def die_with_parent() -> None:
    """A benchmark that is killed leaves no worker behind, which would write where the next run does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


report, *command = sys.argv[1:]
die_with_parent()
start = time.perf_counter()
child = subprocess.Popen(command, preexec_fn=die_with_parent)  # noqa: PLW1509 - one thread
_, status, usage = os.wait4(child.pid, 0)
took = {
    "status": os.waitstatus_to_exitcode(status),
    "wall_s": time.perf_counter() - start,
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "peak_mem_mb": usage.ru_maxrss // 1024,
}
Path(report).write_text(json.dumps(took))
sys.exit(took["status"] != 0)
