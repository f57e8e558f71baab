"""What choosing the best of many does: regret, pressure, and the optimism of a maximum."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln


def cross_fitted_regret(gold_PI: np.ndarray, pick_P: np.ndarray, half_FI: np.ndarray) -> np.ndarray:
    """Contribution of each item to the regret of a choice, in points: their mean is the regret.

    100 mean over F of (gold[j_A, i in B] - gold[pick, i in B]) and A, B swapped; j_A is the plan that is best on
    fold A. Choosing on one fold and scoring on the other removes the optimism of the maximum: over plans that
    are truly equal the naive max - pick is positive, this is 0 on average. The rival is chosen on half of the
    items, so the regret is a lower bound, and below 0 where the proxy chooses better than they do. `pick_P`
    may spread its weight over plans (a random pick is 1/P each).

    Two plans; the pick is the worse one, by 50 points, on every half:

    >>> gold_PI = np.array([[1, 1, 1, 1], [1, 0, 1, 0]])
    >>> halves = np.array([[True, True, False, False]])
    >>> float(cross_fitted_regret(gold_PI, np.array([0, 1]), halves).mean())
    50.0
    """
    chosen_I = pick_P @ gold_PI
    return 100 * (best_elsewhere(gold_PI, half_FI) - chosen_I)


def best_elsewhere(gold_PI: np.ndarray, half_FI: np.ndarray) -> np.ndarray:
    """For each item, the mean score that plans chosen as best on halves without it have on it.

    >>> best_elsewhere(np.array([[1, 1, 1, 0], [1, 0, 1, 0]]), np.array([[True, True, False, False]])).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    halves_HI = np.concatenate([half_FI, ~half_FI])
    # the whole sum, so that ties are the same ones on every machine; the first plan wins a tie
    best_H = np.argmax((halves_HI.astype(float) @ gold_PI.T) / halves_HI.sum(1, keepdims=True), axis=1)
    left_HI = ~halves_HI
    return (left_HI * gold_PI[best_H]).sum(0) / left_HI.sum(0)


def naive_regret(gold_PI: np.ndarray, pick_P: np.ndarray) -> float:
    """100 (max_P mean - mean of the pick), chosen and scored on the same items: biased upwards."""
    mean_P = gold_PI.mean(1)
    return float(100 * (mean_P.max() - pick_P @ mean_P))


def winners_curse(loss_PI: np.ndarray, half_FI: np.ndarray) -> tuple[float, float]:
    """Gain over the mean plan that the plan of lowest loss claims on the windows that chose it, and keeps on others.

    claimed: mean over F of (mean_P loss[i in A] - loss[j_A, i in A]), j_A the plan of lowest loss on A; kept: the same
    j_A on i in B; A and B swapped. claimed - kept is regression to the mean (Manheim and Garrabrant's regressional
    Goodhart): what a plan owes to the windows that chose it.

    >>> winners_curse(np.array([[0, 0, 1, 1], [1, 1, 0, 0]]), np.array([[True, True, False, False]]))
    (0.5, -0.5)
    """
    halves_HI = np.concatenate([half_FI, ~half_FI])
    mean_HP = (halves_HI.astype(float) @ loss_PI.T) / halves_HI.sum(1, keepdims=True)
    gain_HP = mean_HP.mean(1, keepdims=True) - mean_HP
    best_H, half, swapped = np.argmax(gain_HP, axis=1), np.arange(len(gain_HP)), np.roll(gain_HP, len(half_FI), axis=0)
    return float(gain_HP[half, best_H].mean()), float(swapped[half, best_H].mean())


def pressure(n: np.ndarray | int) -> np.ndarray:
    """d = sqrt(ln n - (n - 1) / n), the pressure of choosing the best of n (Gao et al. 2022, arXiv 2210.10760).

    ln n - (n - 1) / n is the KL divergence of best-of-n from one draw. It measures how hard was chosen; it has nothing
    to do with the divergence between two language models.

    >>> pressure(np.array([1, 2, 16])).round(2).tolist()
    [0.0, 0.44, 1.35]
    """
    n = np.asarray(n, dtype=float)
    return np.sqrt(np.maximum(np.log(n) - (n - 1) / n, 0.0))


def best_of(plans: int) -> np.ndarray:
    """w[n - 1, i]: probability that, of n plans drawn from P without replacement, the one ranked i comes first.

    w = C(P - 1 - i, n - 1) / C(P, n), i from 0 (best): the exact mean over all subsets of the pool, no Monte Carlo.

    >>> best_of(3).round(3).tolist()
    [[0.333, 0.333, 0.333], [0.667, 0.333, 0.0], [1.0, 0.0, 0.0]]
    """
    n_N1, i_I = np.arange(1, plans + 1)[:, None], np.arange(plans)
    worse_I = plans - 1 - i_I  # plans behind it, of which the other n - 1 come
    possible = n_N1 - 1 <= worse_I
    rest_NI = np.where(possible, worse_I - (n_N1 - 1), 0)
    log = gammaln(worse_I + 1) - gammaln(n_N1) - gammaln(rest_NI + 1)
    log -= gammaln(plans + 1) - gammaln(n_N1 + 1) - gammaln(plans - n_N1 + 1)
    return np.where(possible, np.exp(log), 0.0)


def overoptimisation_rows(plans: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows a_P, b_P; gold in the proxy's order: a @ gold, b @ gold are alpha, beta of gain(n) = d (alpha - beta d).

    gain(n) is the gold of the proxy's best of n less the mean gold, n = 1 .. P (`best_of`), d its `pressure`; alpha and
    beta are the least squares fit with weights 1 / n, even in ln n. The form is Gao et al.'s (2022) for best-of-n.
    beta > 0: each step of pressure buys less than the last; the gain peaks at d* = alpha / (2 beta).

    Gold that falls by 1 a rank (a perfect proxy), and gold that falls off at the proxy's best:

    >>> a, b = overoptimisation_rows(40)
    >>> fooled = np.concatenate([[-40.0, -20.0], -np.arange(38.0)])
    >>> [round(float(row @ gold), 1) for gold in (-np.arange(40.0), fooled) for row in (a, b)]
    [18.5, 3.8, 29.7, 24.2]
    """
    alpha_P, beta_P = overoptimisation_fit(plans) @ (best_of(plans) - 1 / plans)[1:]
    return alpha_P, beta_P


def overoptimisation_fit(plans: int) -> np.ndarray:
    """Least squares as a matrix: fit @ gain(2 .. P) = (alpha, beta).

    >>> d = pressure(np.arange(2, 9))
    >>> (overoptimisation_fit(8) @ (d * (3 - 0.5 * d))).round(6).tolist()
    [3.0, 0.5]
    """
    n = np.arange(2, plans + 1)
    d, root_N = pressure(n), np.sqrt(1 / n)
    return np.linalg.pinv(np.stack([d, -(d**2)], axis=1) * root_N[:, None]) * root_N


def hypervolume(points_P2: np.ndarray, corner: tuple[float, float]) -> float:
    """Area that points, both coordinates to be minimised, dominate up to a corner: union of their rectangles.

    E. Zitzler and L. Thiele, IEEE Transactions on Evolutionary Computation 3 (1999). Points beyond it add nothing.

    >>> hypervolume(np.array([[1.0, 2.0], [2.0, 1.0], [2.5, 2.5]]), (3.0, 3.0))  # 2 x 1 + 1 x 2 - 1 x 1
    3.0
    """
    area, height = 0.0, corner[1]
    for x, y in sorted(map(tuple, points_P2)):
        if x < corner[0] and y < height:
            area += (corner[0] - x) * (height - y)
            height = y
    return float(area)
