"""A real Slurm of one node on this machine: munged, slurmctld and slurmd, without systemd; needs root.

The node claims 8 cores, 256 GB and two GPUs (device files that are none), whatever it has: only placement is tested.
"""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/d
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
JobRequeue=0
MinJobAge=3600
SchedulerParameters=sched_interval=5
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=256000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
GRES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
ETC = Path("/etc/slurm")  # with SLURM_CONF pointing elsewhere the srun within a job fails


def install() -> str:
    """Slurm from Debian's packages where it is missing; returns why there is none, or nothing."""
    if os.geteuid():
        return "the daemons of Slurm need root"
    if not (shutil.which("slurmctld") and shutil.which("munged")):
        if not shutil.which("apt-get"):
            return "no Slurm here, and no apt-get to install it"
        command = "apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"slurm-wlm could not be installed: {done.stderr.strip()[-200:]}"
    if any(process.name() in ("slurmctld", "slurmd") for process in psutil.process_iter(["name"])):
        return "a Slurm is running here already; it is left alone"
    return ""


def squeue(*options: str) -> list[str]:
    return subprocess.run(["squeue", "-h", *options], capture_output=True, text=True, check=True).stdout.split("\n")[
        :-1
    ]


def jobs() -> list[dict[str, str]]:
    """All jobs that slurmctld remembers, ended ones too, as `scontrol` tells them."""
    lines = subprocess.run(["scontrol", "-o", "show", "job"], capture_output=True, text=True, check=True).stdout
    return [
        dict(word.split("=", 1) for word in line.split() if "=" in word)
        for line in lines.splitlines()
        if line.startswith("JobId=")
    ]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """The three daemons while the block lasts; they, and the configuration in /etc/slurm, are gone afterwards."""
    for name in ("ctld", "d"):
        (folder / name).mkdir(parents=True)
    host, run = platform.node().partition(".")[0], Path("/run/munge")
    before = {name: (ETC / name).read_bytes() for name in ("slurm.conf", "gres.conf") if (ETC / name).exists()}
    ETC.mkdir(exist_ok=True)
    (ETC / "slurm.conf").write_text(CONF.format(host=host, folder=folder))
    (ETC / "gres.conf").write_text(GRES)
    munged = not any(process.name() == "munged" for process in psutil.process_iter(["name"]))
    try:
        if munged:
            run.mkdir(exist_ok=True)
            shutil.chown(run, "munge", "munge")
            as_munge = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups"]
            subprocess.run([*as_munge, "munged", "--force"], check=True, capture_output=True)
        subprocess.run(["slurmctld", "-i"], check=True)
        subprocess.run(["slurmd"], check=True)
        end = time.monotonic() + 30
        while subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout.strip() != "idle":  # noqa: PLW1510
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True, check=False)
        time.sleep(1)
        pids = [folder / "slurmd.pid", folder / "slurmctld.pid", *([run / "munged.pid"] if munged else [])]
        for path in pids:
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                process = psutil.Process(int(path.read_text()))
                process.send_signal(signal.SIGTERM)
                process.wait(15)
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)
            if name in before:
                (ETC / name).write_bytes(before[name])
