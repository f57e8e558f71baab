"""Intervals from bootstraps: of means, and of what depends on plans and items at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL, Z = 0.975, 1.959964
PSEUDO_ITEMS = 2.0  # one in favour of each side: variance that counts of discordant items lack when they are few
EDGE = 1 - 1e-3  # artanh of a correlation of 1 is infinite


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and what tests need: standard error and degrees of freedom."""

    value: float
    lo: float
    hi: float
    deviation: float
    df: float


def quantile(df: float) -> float:
    """t(.975; df), the half-width of an interval in standard errors.

    >>> round(quantile(23), 2), round(quantile(1e9), 2)
    (2.07, 1.96)
    """
    return float(stdtrit(df, LEVEL))


def mean_interval(value: float, value_R: np.ndarray, units: float, extra: float = 0.0) -> Estimate:
    """value +- t(.975; U - 1) s, s^2 = U / (U - 1) var_R + extra; U units (windows, items, clusters) were drawn.

    Percentiles of a bootstrap are too narrow for few units (93 % at 24 windows); Student's t with the bootstrap's
    deviation is exact for normal means. `extra` keeps binary differences honest when few items differ: with 2 / n^2
    (one pseudo-item a side, Bonett and Price 2012) 100 items without any difference say +- 2.8 points, as the rule
    of three does, where a bootstrap says +- 0.

    >>> found = mean_interval(0.0, np.zeros(500), 100, extra=PSEUDO_ITEMS / 100**2)
    >>> round(100 * found.lo, 1), round(100 * found.hi, 1)
    (-2.8, 2.8)
    """
    df = max(units - 1, 1)
    deviation = float(np.sqrt(np.var(value_R) * units / df + extra))
    half = quantile(df) * deviation
    return Estimate(float(value), value - half, value + half, deviation, df)


def share_interval(share: float, deviation: float, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of n items, fewer if its `deviation` over clusters says so.

    (s + z^2 / 2m +- z sqrt(s (1 - s) / m + z^2 / 4m^2)) / (1 + z^2 / m), m = min(n, s (1 - s) / deviation^2), z = 1.96.

    >>> three = ((0.0, 0.0), (0.1, 0.03), (0.1, 0.06))
    >>> [round(end, 3) for share, deviation in three for end in share_interval(share, deviation, 100)]
    [0.0, 0.037, 0.055, 0.174, 0.032, 0.275]
    """
    m, z = (min(n, share * (1 - share) / deviation**2) if deviation > 0 else n), Z
    centre, half = share + z**2 / (2 * m), z * np.sqrt(share * (1 - share) / m + z**2 / (4 * m**2))
    lo, hi = (float(each) / (1 + z**2 / m) for each in (centre - half, centre + half))
    return max(0.0, lo), min(1.0, hi)


def jackknife(value: float, without_G: np.ndarray) -> Estimate:
    """value +- t(.975; G - 1) s, s^2 = (G - 1) / G sum (theta_g - mean)^2, theta_g without block g (Tukey 1958).

    For what a bootstrap distorts because it chooses anew among resampled scores.

    >>> x = np.array([1.0, 2.0, 4.0, 5.0])
    >>> found = jackknife(x.mean(), (x.sum() - x) / 3)
    >>> round(found.deviation, 3) == round(float(x.std(ddof=1)) / 2, 3)
    True
    """
    blocks = len(without_G)
    deviation = float(np.sqrt((blocks - 1) * np.var(without_G)))
    half = quantile(blocks - 1) * deviation
    return Estimate(float(value), value - half, value + half, deviation, blocks - 1)


def two_way(plans_R: np.ndarray, items_R: np.ndarray, both_R: np.ndarray) -> float:
    """Deviation of a statistic over plans x items, both of them samples: s^2 = 2 (V_plans + V_items) - V_both.

    With V_plans = A + E, V_items = B + E (A between plans, B between items, E what is left) a bootstrap of both at
    once gives A + B + 3 E (Owen, The pigeonhole bootstrap, 2007): E is counted three times. s^2 counts it once. It
    is a difference of estimates, so it is held between max(V_plans, V_items) and V_plans + V_items.

    >>> rng = np.random.default_rng(0)
    >>> X_PI = rng.normal(0, 1, (40, 1)) + rng.normal(0, 2, (1, 90)) + rng.normal(0, 9, (40, 90))
    >>> p, i = (rng.multinomial(n, [1 / n] * n, size=4000) / n for n in (40, 90))
    >>> plans_R, items_R, both_R = p @ X_PI.mean(1), i @ X_PI.mean(0), np.einsum("rp,pi,ri->r", p, X_PI, i)
    >>> truth = np.sqrt(1 / 40 + 4 / 90 + 81 / 3600)
    >>> [round(float(s), 2) for s in (truth, both_R.std(), two_way(plans_R, items_R, both_R))]
    [0.3, 0.38, 0.31]
    """
    told = (each[np.isfinite(each)] for each in (plans_R, items_R, both_R))
    plans, items, both = (float(np.var(each)) if len(each) else 0.0 for each in told)
    return float(np.sqrt(np.clip(2 * (plans + items) - both, max(plans, items), plans + items)))


def fisher_interval(
    rho: float, plans_R: np.ndarray, items_R: np.ndarray, both_R: np.ndarray, n: int
) -> tuple[float, float]:
    """tanh(artanh(rho) +- t(.975; n - 3) s), s the deviation `two_way` of artanh over the bootstraps, n plans.

    Resampling the items adds their noise a second time and pulls the resampled rho towards 0, so percentiles
    of rho_R would be off centre; their spread is what is used.

    >>> rho_R = np.tanh(np.arctanh(-0.9) + 0.2 * np.array([-1.0, 1.0]))
    >>> [round(end, 2) for end in fisher_interval(-0.9, rho_R, np.zeros(2), rho_R, 10**6)]
    [-0.95, -0.79]
    """
    if not np.isfinite(rho) or np.isfinite(both_R).sum() < 2:
        return np.nan, np.nan
    deviation = two_way(*(np.arctanh(np.clip(each, -EDGE, EDGE)) for each in (plans_R, items_R, both_R)))
    centre, half = np.arctanh(np.clip(rho, -EDGE, EDGE)), quantile(max(n - 3, 1)) * deviation
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))
