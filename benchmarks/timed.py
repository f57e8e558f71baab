"""python timed.py REPORT.json COMMAND ...: run the command, write what it took (the fields of `running.Took`)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

report, *command = sys.argv[1:]
start = time.perf_counter()
child = subprocess.Popen(command)
_, status, usage = os.wait4(child.pid, 0)
took = {
    "status": os.waitstatus_to_exitcode(status),
    "wall_s": time.perf_counter() - start,
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "peak_mem_mb": usage.ru_maxrss // 1024,
}
Path(report).write_text(json.dumps(took))
sys.exit(took["status"] != 0)
