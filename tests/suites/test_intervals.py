from __future__ import annotations

import numpy as np
import pytest

from bitalloc.suites import intervals


def test_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        values = rng.exponential(size=60)
        interval = intervals.mean(values, np.ones(60), ["a"] * 60, resamples=400, seed=trial)
        hits += interval.lo <= 1.0 <= interval.hi
    assert 0.88 <= hits / 300 <= 0.98


def test_many_groups_are_drawn_whole_and_few_are_strata() -> None:
    rng = np.random.default_rng(0)
    many = np.repeat(np.arange(40), 10)
    effect = rng.normal(size=40)[many] + 0.01 * rng.normal(size=400)
    width = {}
    for name, groups in {"whole": many, "one": np.zeros(400)}.items():
        interval = intervals.mean(effect, np.ones(400), groups, resamples=500, seed=0)
        width[name] = interval.hi - interval.lo
    assert width["whole"] > 2 * width["one"]
    few = np.repeat(np.arange(4), 100)
    strata = intervals.mean(10.0 * few + rng.normal(size=400), np.ones(400), few, resamples=500, seed=0)
    assert strata.n == 400
    assert strata.hi - strata.lo < 0.5  # the spread between the four groups is no sampling error


def test_weights_are_the_tokens_behind_a_value() -> None:
    whole = intervals.mean([1.0, 3.0, 3.0, 3.0], [1, 1, 1, 1], ["a"] * 4, resamples=10, seed=0)
    pooled = intervals.mean([1.0, 3.0], [1, 3], ["a"] * 2, resamples=10, seed=0)
    assert whole.value == pooled.value == 2.5


@pytest.mark.parametrize("units", [1, 2, 7, 40])
def test_median_resamples_are_medians(units: int) -> None:
    values = np.random.default_rng(units).normal(size=units)
    interval = intervals.median(values, ["a"] * units, resamples=300, seed=3)
    counts = np.random.default_rng(3).multinomial(units, np.full(units, 1 / units), size=300)
    naive = [np.median(np.repeat(values, count)) for count in counts]
    assert interval.value == np.median(values)
    assert [interval.lo, interval.hi] == pytest.approx(np.quantile(naive, [0.025, 0.975]).tolist())


def test_the_seed_alone_decides() -> None:
    values = np.random.default_rng(0).normal(size=30)
    draw = [intervals.mean(values, np.ones(30), ["a"] * 30, resamples=200, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
