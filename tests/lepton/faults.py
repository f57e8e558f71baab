"""Faults, each a run of the toy workflow that meets one; `count` says what is left afterwards.

`share` in [0, 1) places a fault in time: `make bench-clusters` draws it anew for every repetition.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from .project import LIMIT_S, Toy, wait_for


@dataclass(frozen=True)
class Outcome:
    """What a fault left behind. `leaked`: jobs with a process once the run, or the first of two, had ended."""

    status: int
    leaked: int
    doubles: int
    lost: int
    created: int


def at_work(toy: Toy) -> bool:
    """Every job has begun its shell command."""
    return all((toy.folder / f"trace-{n}").exists() for n in range(toy.jobs))


def after_all_work(toy: Toy, fault: Callable[[], None]) -> int:
    with toy.started() as head:
        wait_for(lambda: at_work(toy), head)
        fault()
        return head.wait(LIMIT_S)


def undisturbed(toy: Toy, share: float) -> int:
    return toy.run()


def setting(**faults: object) -> Callable[[Toy, float], int]:
    """The stand-in fails from the moment on at which snakemake has said hello, before it has created a job."""

    def run(toy: Toy, share: float) -> int:
        toy.standin.after_hello = faults
        status = toy.run()
        assert not (left := toy.standin.left(*faults)), f"not injected: {left}"
        return status

    return run


def storm_at_work(toy: Toy, share: float) -> int:
    return after_all_work(toy, lambda: setattr(toy.standin, "storm", 8))


def refused_at_work(toy: Toy, share: float) -> int:
    with toy.started() as head:
        wait_for(lambda: at_work(toy), head)
        toy.standin.refuse = True
        time.sleep(3)
        toy.standin.refuse = False
        return head.wait(LIMIT_S)


def refused_from_the_start(toy: Toy, share: float) -> int:
    toy.standin.refuse = True
    return toy.run()


def killed_outside(state: str) -> Callable[[Toy, float], int]:
    def kill(toy: Toy) -> None:
        victim = next(iter(toy.standin.jobs.values()))
        victim.kill(state)
        if state == "Deleted":
            del toy.standin.jobs[victim.id]

    return lambda toy, share: after_all_work(toy, lambda: kill(toy))


def interrupted(toy: Toy, share: float, *, again: bool = False) -> int:
    """Ctrl-C at any moment; nothing may run then. The same command again finishes the work."""
    with toy.started() as head:
        time.sleep(share * toy.run_s)
        for _ in range(3 if again else 1):
            os.killpg(head.pid, signal.SIGINT)
            time.sleep(0.3)
        head.wait(LIMIT_S)
    return _afterwards(toy)


def _afterwards(toy: Toy) -> int:
    time.sleep(1 + toy.standin.late_s)
    toy.leaked = len(toy.standin.running())
    toy.standin.set(storm=0, lost=0, late=0, delay_s=0)
    toy.unlock()
    return toy.run()


def interrupting(**faults: object) -> Callable[[Toy, float], int]:
    """Ctrl-C within two seconds of the first request, while the API fails: around the creations."""

    def run(toy: Toy, share: float) -> int:
        toy.standin.after_hello = faults
        with toy.started() as head:
            wait_for(lambda: toy.standin.requests, head)
            time.sleep(share * 2)
            os.killpg(head.pid, signal.SIGINT)
            head.wait(LIMIT_S)
        return _afterwards(toy)

    return run


def killed_head(toy: Toy, share: float, *, code: int | None = None, wait: bool = False) -> int:
    """`kill -9` of snakemake at any moment; unlocked and started again."""
    with toy.started() as head:
        if wait:
            wait_for(lambda: at_work(toy), head)
        else:
            time.sleep(share * toy.run_s)
        head.kill()
        head.wait()
    if code is not None:
        toy.write(code=code)
    toy.unlock()
    return toy.run()


def terminated(toy: Toy, share: float) -> int:
    """SIGTERM: running jobs are waited for, the rest is not begun; the same command again finishes."""
    with toy.started() as head:
        time.sleep(share * toy.run_s)
        head.terminate()
        head.wait(LIMIT_S)
    time.sleep(1)
    toy.leaked = len(toy.standin.running())
    toy.unlock()  # it may have come before snakemake heeds it
    return toy.run()


def elsewhere(toy: Toy, share: float) -> int:
    toy.standin.elsewhere = str(toy.folder)
    return toy.run()


# fault -> (how to run into it, exit status due, whether the work gets done)
FAULTS: dict[str, tuple[Callable[[Toy, float], int], int, bool]] = {
    "none": (undisturbed, 0, True),
    "8 consecutive 503": (setting(storm=8), 0, True),
    "8 consecutive 503 while jobs run": (storm_at_work, 0, True),
    "8 consecutive 404 for everything": (setting(storm=8, storm_status=404), 0, True),
    "5 answers cut in the middle": (setting(garbled=5), 0, True),
    "answers of 2 creations lost": (setting(lost=2), 0, True),
    "2 creations take effect 1 s after the connection broke": (setting(late=2), 0, True),
    "3 requests without an answer": (setting(mute=3), 0, True),
    "every request takes 0.5 s": (setting(delay_s=0.5), 0, True),
    "the listing is empty": (setting(unlisted=True), 0, True),
    "401 for 3 s while jobs run": (refused_at_work, 0, True),
    "401 from the start": (refused_from_the_start, 1, False),
    "400 for every creation": (setting(reject=True), 1, False),
    "a job killed (Failed)": (killed_outside("Failed"), 0, True),
    "a job stopped by a colleague (Stopped)": (killed_outside("Stopped"), 0, True),
    "a job deleted by a colleague (404)": (killed_outside("Deleted"), 0, True),
    "the mount is not the head's": (elsewhere, 1, False),
    "Ctrl-C": (interrupted, 0, True),
    "Ctrl-C three times": (lambda toy, share: interrupted(toy, share, again=True), 0, True),
    "Ctrl-C, requests take 0.5 s": (interrupting(delay_s=0.5), 0, True),
    "Ctrl-C, 5 consecutive 503": (interrupting(storm=5), 0, True),
    "Ctrl-C, answers of 2 creations lost": (interrupting(lost=2), 0, True),
    "Ctrl-C, 2 creations take effect 1 s later": (interrupting(late=2), 0, True),
    "SIGTERM": (terminated, 0, True),
    "kill -9, run again": (killed_head, 0, True),
    "kill -9, code changed, run again": (lambda toy, share: killed_head(toy, share, code=2), 0, True),
}


def count(toy: Toy, status: int) -> Outcome:
    time.sleep(0.3)
    standin = toy.standin
    leaked = getattr(toy, "leaked", 0) + len(standin.running())
    return Outcome(status, leaked, len(standin.doubles()), len(toy.missing()), len(standin.jobs))
