"""Fresh processes within milliseconds, forked from one that has imported the libraries and computed nothing.

What a process's memory peaks at tells of its work only if nothing was done in it before, and Python takes seconds to
start with torch and transformers in it. So one server imports them, and every process is a fork of it that holds one
object and answers calls. All of them end when the process that asked for them does, by kill -9 too: sockets close.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from bitalloc.errors import BitallocError


class OutOfMemory(Exception):  # noqa: N818 - what happened, and what the record says
    """A process had not the memory for what it was asked, or was killed, which is what the kernel does then."""


class Server:
    """Forks processes on demand; a context."""

    def __init__(self, prepare: str = "", *arguments: Any) -> None:
        """`prepare`: a function, `package.module:name`, that imports what all the processes need."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", f"from bitalloc.profile.processes import serve; serve({theirs.fileno()})"]
        environ = {
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
        }  # threads of one that waits leave the cores to the others
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environ)
        theirs.close()
        self._control = ours
        given = pickle.dumps((sys.path, prepare, arguments))
        ours.sendall(len(given).to_bytes(8) + given)

    def start(self, make: str, *arguments: Any) -> Remote:
        """A fresh process that holds what `make`, `package.module:name`, gives for the arguments."""
        ours, theirs = Pipe()
        try:
            socket.send_fds(self._control, [b"x"], [theirs.fileno()])
        except OSError:
            raise BitallocError("the process from which others are made has ended; see above, then rerun") from None
        finally:
            theirs.close()
        remote = Remote(ours)
        try:
            remote.call(make, *arguments)
        except BaseException:
            remote.close()
            raise
        return remote

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.close()
        self._process.wait()


class Remote:
    """An object in a process of its own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method gives. Raises `OutOfMemory`, the method's `BitallocError`, and `RuntimeError` for others."""
        try:
            self._connection.send((method, arguments))
            said, value = self._connection.recv()
        except (EOFError, OSError):
            raise OutOfMemory("its process was killed") from None
        if said == "memory":
            raise OutOfMemory(value)
        if said == "refused":
            raise BitallocError(value)
        if said == "failed":
            raise RuntimeError(f"in a process of its own:\n{value}")
        return value

    def close(self) -> None:
        """Let the process end, once it is done with what it is at."""
        self._connection.close()


# ---- in the server and in what it forks ----------------------------------------------------------------
def serve(descriptor: int) -> None:
    """Fork whenever a socket arrives, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the one who asked has the word
    control = socket.socket(fileno=descriptor)
    path, prepare, arguments = pickle.loads(_exactly(control, int.from_bytes(_exactly(control, 8))))
    sys.path[:] = path
    if prepare:
        _named(prepare)(*arguments)
    gc.collect()
    gc.freeze()  # collecting what the forks share would write to it, and so copy it in every one
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            os._exit(0)  # libraries that leave in peace say things about themselves
        if not os.fork():
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(Connection(descriptors[0]))
            os._exit(0)  # what the server would do at its end is not theirs to do
        os.close(descriptors[0])


def _answer(connection: Connection) -> None:
    """Make the object, then call its methods, until the other end is closed."""
    held: Any = None
    with suppress(EOFError, OSError):
        while True:
            name, arguments = connection.recv()
            try:
                if held is None:
                    held, value = _named(name)(*arguments), None
                else:
                    value = getattr(held, name)(*arguments)
                answer = ("ok", value)
            except BitallocError as error:
                answer = ("refused", str(error))
            except Exception as error:  # noqa: BLE001 - it is told where it was asked for
                kind = "memory" if memory_error(error) else "failed"
                answer = (kind, str(error).splitlines()[0] if kind == "memory" else traceback.format_exc())
            connection.send(answer)


def memory_error(error: Exception) -> bool:
    """Whether memory is what was missing; torch says so on a CPU in a `RuntimeError` of its allocator.

    >>> memory_error(MemoryError()), memory_error(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator"))
    (True, True)
    >>> memory_error(ValueError("shape"))
    False
    """
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for it
    return named or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _exactly(control: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        if not (part := control.recv(count - len(found))):
            os._exit(0)
        found += part
    return found


def _named(name: str) -> Callable[..., Any]:
    module, _, leaf = name.partition(":")
    return getattr(importlib.import_module(module), leaf)
