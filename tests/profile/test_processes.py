"""Processes: forked on demand, each with one object; how they fail is told. Every one of them imports this file."""

import os

import pytest

from bitalloc.errors import BitallocError
from bitalloc.profile.processes import OutOfMemory, Server


class Planned:
    """For processes: does what it is told."""

    def __init__(self, number: int) -> None:
        self.number = number

    def add(self, other: int) -> int:
        return self.number + other

    def fail(self, kind: str) -> None:
        if kind == "killed":
            os.kill(os.getpid(), 9)
        raise {
            "memory": MemoryError("none left"),
            "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "refused": BitallocError("not this one; take another"),
            "failed": ValueError("a fault of ours"),
        }[kind]


def test_processes_hold_what_they_were_given_and_say_how_they_failed() -> None:
    with Server() as server:
        one, two = (server.start("tests.profile.test_processes:Planned", number) for number in (1, 10))
        assert (one.call("add", 1), two.call("add", 1)) == (2, 11)
        for kind, error in (("memory", OutOfMemory), ("torch", OutOfMemory), ("refused", BitallocError)):
            with pytest.raises(error):
                one.call("fail", kind)
        with pytest.raises(RuntimeError, match="ValueError: a fault of ours"):
            one.call("fail", "failed")
        assert one.call("add", 2) == 3  # it lives on
        with pytest.raises(OutOfMemory, match="was killed"):
            one.call("fail", "killed")
        assert two.call("add", 2) == 12
    with pytest.raises(BitallocError):
        server.start("tests.profile.test_processes:Planned", 1)
