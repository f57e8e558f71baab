"""Plain progress lines that stay readable when several jobs write to one terminal or to a log."""

from __future__ import annotations

import sys
import time


def clock(seconds: float) -> str:
    """Seconds as people read them.

    >>> clock(59), clock(61), clock(3 * 3600 + 125)
    ('0:59', '1:01', '3:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts to `total` and says so on stderr at most once every `every_s` seconds: n of N, rate, time left, and what.

    What was found in the store (`advance(cached=True)`) does not count towards the rate.
    """

    def __init__(self, stage: str, total: int, *, unit: str = "experiments", every_s: float = 5.0) -> None:
        self.stage, self.total, self.unit, self.every_s = stage, total, unit, every_s
        self.done = self.cached = 0
        self.note = ""  # what is being done, where `advance` does not say
        self.start = self.said = time.monotonic()

    def advance(self, count: int = 1, *, cached: bool = False, note: str = "") -> None:
        self.done += count
        self.cached += count if cached else 0
        now = time.monotonic()
        if now - self.said >= self.every_s or (self.done >= self.total and now - self.start >= self.every_s):
            self.said = now
            self.say(note)

    def say(self, note: str = "") -> None:
        elapsed, fresh = time.monotonic() - self.start, self.done - self.cached
        speed = "? left"
        if fresh:
            rate = fresh / max(elapsed, 1e-3)
            told = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            speed = f"{told}/s, {clock(elapsed / fresh * (self.total - self.done))} left"
        tail = f", {note or self.note}" if note or self.note else ""
        print(f"[{self.stage}] {self.done:,} of {self.total:,} {self.unit}, {speed}{tail}", file=sys.stderr, flush=True)
