"""Locks for folders that several processes, and several machines, write."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

BEAT_S, STALE_S = 10.0, 60.0  # a lock is renewed every BEAT_S; one that was not for STALE_S is void


class Lock:
    """A file that its holder made, rewrites from time to time, and removes. It works on network file systems too.

    `flock` does not: there it may be refused, or hold on one machine only. Making a file under a name that is free and
    renaming are atomic everywhere. A lock is void when its holder was a process of this machine that is no more, or
    when it has not changed for `STALE_S` as seen from here, so no two clocks are compared. Work behind it is safe but
    done twice should a holder be cut off for longer and come back: shards are the same whoever writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.mine = path, json.dumps([_machine(), os.getpid(), _started(os.getpid()), uuid4().hex])
        self._seen: dict[str, tuple[tuple[str, float], float]] = {}  # what others hold, and since when it looks so
        self._over = threading.Event()

    def take(self) -> bool:
        """Whether the lock is ours now. A void one is cleared away, to be had next time."""
        temporary = self.path.with_name(f".{self.path.name}.{uuid4().hex}.tmp")
        temporary.write_text(self.mine)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            self._clear()
            return False
        finally:
            temporary.unlink()
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self._over.set()
        with suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self.path)

    def _clear(self) -> None:
        """Remove the lock if it is void. Who clears holds a guard and looks again, so the next holder's stays."""
        if not self._void("lock", _content(self.path)):
            return
        guard = self.path.with_name(f".{self.path.name}.clearing")
        try:
            guard.touch(exist_ok=False)
        except FileExistsError:
            if self._void("guard", _content(guard)):  # its maker was killed in between
                guard.unlink(missing_ok=True)
            return
        try:
            if self._void("lock", _content(self.path)):
                self.path.unlink()
        finally:
            guard.unlink(missing_ok=True)

    def _void(self, what: str, found: tuple[str, float] | None) -> bool:
        """Whether nobody holds this: the process is known to be gone, or it has looked the same for too long."""
        if found is None:
            return False
        now = time.monotonic()
        seen, since = self._seen.get(what, (None, now))
        if seen != found:
            since = now
        self._seen[what] = found, since
        return (what == "lock" and _gone(found[0])) or now - since > STALE_S


def _content(path: Path) -> tuple[str, float] | None:
    """What a lock says and when it was renewed, as the server has it; None where there is none."""
    try:
        with path.open() as file:  # opening asks the server; a path alone may be told from a cache
            return file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Where process numbers mean the same: one boot of one kernel, and one container on it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot; a number that is used again is another process's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _gone(content: str) -> bool:
    """Whether the process that wrote this into its lock is known to be no more."""
    try:
        machine, pid, started, _ = json.loads(content)
        if machine != _machine():
            return False
        os.kill(pid, 0)
        return started != _started(pid)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and somebody else's
        return False
    except (TypeError, ValueError):  # no lock of ours: of a version that used flock, or torn
        return True
