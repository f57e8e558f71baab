"""Progress lines: n of N, rate, time left, what is at work; and no trust in the clock on the wall."""

import itertools

import pytest

from bitalloc.progress import Progress


@pytest.fixture
def tick(monkeypatch):
    """Each look at the monotonic clock is 10 s after the one before; the clock on the wall goes back a day a look."""
    monotonic, wall = itertools.count(0, 10), itertools.count(2e9, -86_400)
    monkeypatch.setattr("time.monotonic", lambda: next(monotonic))
    monkeypatch.setattr("time.time", lambda: next(wall))


def test_a_line_says_how_far_how_fast_how_long_and_what(tick, capsys):
    progress = Progress("sweep block-003", 63)
    progress.advance(40, cached=True)
    progress.advance(3, note="q_proj")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "[sweep block-003] 40 of 63 experiments, ? left"  # the store says nothing about the rate
    assert second == "[sweep block-003] 43 of 63 experiments, 0.075/s, 4:27 left, q_proj"


def test_lines_are_at_least_so_many_seconds_apart(tick, capsys):
    progress = Progress("evaluate", 10, unit="plans", every_s=30)
    for _ in range(9):
        progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3", "5", "7", "9"]
