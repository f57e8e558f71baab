"""Fair: the plan whose worst-off language loses least, within a byte budget and a limit to what one language may lose.

Every language l has costs of its own, d_l(x) = sum_i d_lik of plan x. The problem

    min_x max_l d_l(x)   subject to   bytes(x) <= B   and   d_e(x) <= limit

has for weights w >= 0 of the languages, sum w = 1, and a price m >= 0 on the limit the bound

    L(w, m) = min_x sum_l w_l d_l(x) + m (d_e(x) - limit),

a multiple-choice knapsack, which `optimal` solves exactly. L is concave; its maximum is found by cutting planes (J. E.
Kelley, The cutting-plane method for solving convex programs, J. SIAM 8, 1960): each plan met bounds L from above by a
plane, a linear programme finds where the planes allow most, and the weights there ask for the next plan. The best plan
met, improved by changes of one matrix and of two, is returned; the largest L certifies it.

Legend: L languages, N matrices, K options, P planes; `choice_N` holds an option index for each matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitalloc.errors import BitallocError
from bitalloc.strategies.instance import Choice, Instance
from bitalloc.strategies.optimal import Solution, solve

ROUNDS = 60  # plans asked for, at most
CLOSE = 1e-4  # a certified gap, as a share of the objective, at which to stop
_ENGLISH = "en"
DEAREST = 1e6  # price on the limit, at most
PAIRS = 20_000_000  # changes of two matrices looked at in one step, at most


def fair(
    instance: Instance,
    damage_LNK: NDArray[np.float64],
    budget: int,
    *,
    limited: int | None = None,
    limit: float = np.inf,
    rounds: int = ROUNDS,
) -> Solution:
    """The plan of least max_l d_l within `budget` bytes; `objective` and `lower_bound` speak of that maximum.

    `damage_LNK`: what each option does to each language, in one unit for all (relative to the reference, say); ignored
    where the instance does not offer the option. `limited`: the language whose damage may not exceed `limit`.
    Raises `BitallocError` when no plan is within budget and limit.
    """
    problem = _Problem(instance, damage_LNK, budget, limited, limit)
    languages = len(damage_LNK)
    choice_N, bound = problem.kindest(), 0.0
    planes = [problem.damage(choice_N)]
    weight_L, price = np.full(languages, 1 / languages), 0.0
    for _ in range(rounds):
        found = problem.solve(weight_L, price)
        bound = max(bound, found.lower_bound - (price * limit if price else 0.0))
        planes.append(problem.damage(found.choice_N))
        choice_N = min(choice_N, found.choice_N, key=problem.rank)
        if problem.rank(choice_N)[0] <= bound * (1 + CLOSE):
            break
        asked = weight_L, price
        weight_L, price = problem.steepest(np.array(planes))
        if np.allclose(weight_L, asked[0], rtol=0, atol=1e-12) and np.isclose(price, asked[1], rtol=1e-9, atol=0):
            break
    choice_N = problem.improved(choice_N)
    objective = float(problem.damage(choice_N).max())
    return Solution(choice_N, objective, min(objective, bound))


@dataclass(frozen=True, eq=False)
class Spoken:
    """What every option does to each language, [N, K] of one unit, and the strategies that ask for it.

    `margin`: what English may lose more than under the plan that ignores languages, in the same unit.
    """

    damage: Mapping[str, NDArray[np.float64]]
    margin: float

    def choose(self, name: str, instance: Instance, budget: int, *, ignoring: Choice) -> tuple[Choice, str]:
        """The plan of a strategy, and a note of what it promises; `ignoring` is the plan that ignores languages.

        Raises `BitallocError` when there is no language to choose by.
        """
        if not self.damage:
            raise BitallocError("in no language is the model better than a byte-unigram model: none can be protected")
        if name == "english":
            if _ENGLISH not in self.damage:
                raise BitallocError("the strategy english needs en among fairness.languages, and above its floor")
            own = dataclasses.replace(instance, costs_NK=self.damage[_ENGLISH])
            return solve(own, budget).choice_N, "least damage to English"
        limits = {}
        if _ENGLISH in self.damage:
            allowed = float(instance.at(self.damage[_ENGLISH], ignoring).sum()) + self.margin
            limits = {"limited": list(self.damage).index(_ENGLISH), "limit": allowed}
        found = fair(instance, np.stack(list(self.damage.values())), budget, **limits)
        note = f"the worst-off language is predicted to lose {found.objective:.3g} of its NLL"
        return found.choice_N, f"{note}, {found.gap:.1e} above the bound"


@dataclass(frozen=True, eq=False)
class _Problem:
    instance: Instance
    damage_LNK: NDArray[np.float64]
    budget: int
    limited: int | None
    limit: float
    offered_NK: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.instance.require(self.budget)
        offered_NK = np.isfinite(self.instance.costs_NK)
        d_LNK = np.where(offered_NK, self.damage_LNK, np.inf)
        if not (d_LNK >= 0).all() or not np.isfinite(d_LNK[:, offered_NK]).all():
            raise BitallocError("damage of a language is not finite, or negative; repeat its sensitivity")
        object.__setattr__(self, "damage_LNK", d_LNK)
        object.__setattr__(self, "offered_NK", offered_NK)

    def damage(self, choice_N: Choice) -> NDArray[np.float64]:
        """d_L of a plan."""
        return self.damage_LNK[:, np.arange(len(choice_N)), choice_N].sum(axis=1)

    def rank(self, choice_N: Choice) -> tuple[float, int]:
        """What to minimise: damage of the worst-off, infinite above the limit, then bytes."""
        d_L = self.damage(choice_N)
        above = self.limited is not None and d_L[self.limited] > self.limit
        return float("inf") if above else float(d_L.max()), self.instance.size(choice_N)

    def solve(self, weight_L: NDArray[np.float64], price: float) -> Solution:
        """The plan of least weighted damage within the budget, the limited language's with `price` on top."""
        full_L = weight_L.copy()
        if self.limited is not None:
            full_L[self.limited] += price
        costs_NK = np.full(self.offered_NK.shape, np.inf)
        costs_NK[self.offered_NK] = full_L @ self.damage_LNK[:, self.offered_NK]
        return solve(dataclasses.replace(self.instance, costs_NK=costs_NK), self.budget)

    def kindest(self) -> Choice:
        """The plan under which the limited language loses least, without one the sum over languages."""
        if self.limited is None:
            return self.solve(np.full(len(self.damage_LNK), 1 / len(self.damage_LNK)), 0.0).choice_N
        least = self.solve(np.zeros(len(self.damage_LNK)), 1.0)
        if least.objective > self.limit:
            raise BitallocError(
                f"within {self.budget:,} bytes the limited language loses at least {least.lower_bound:.4g}, but may "
                f"lose {self.limit:.4g}; raise the budget or the margin"
            )
        return least.choice_N

    def steepest(self, planes_PL: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """(w_L, m) at which the planes allow L most: max t, t <= w . d + m (d_e - limit) for every plane d."""
        from scipy.optimize import linprog

        scale = planes_PL.max() or 1.0
        over_P = np.zeros(len(planes_PL)) if self.limited is None else planes_PL[:, self.limited] - self.limit
        rows = np.column_stack([-planes_PL / scale, -over_P / scale, np.ones(len(planes_PL))])
        languages = planes_PL.shape[1]
        found = linprog(
            np.eye(languages + 2)[-1] * -1,
            A_ub=rows,
            b_ub=np.zeros(len(rows)),
            A_eq=[[1.0] * languages + [0.0, 0.0]],
            b_eq=[1.0],
            bounds=[(0, 1)] * languages + [(0, DEAREST if self.limited is not None else 0), (None, None)],
        )
        weight_L = np.maximum(found.x[:languages], 0)
        return weight_L / weight_L.sum(), float(max(found.x[languages], 0))

    def improved(self, choice_N: Choice) -> Choice:
        """The plan after changes of one matrix, or of two at once, for as long as one helps the worst-off."""
        choice_N = choice_N.copy()
        i_M, k_M = np.nonzero(self.offered_NK)  # M places: a matrix and an option of it
        sizes = (1, 2) if len(i_M) ** 2 * len(self.damage_LNK) <= PAIRS else (1,)
        while True:
            now_LN = self.damage_LNK[:, np.arange(len(choice_N)), choice_N]
            change_LM = self.damage_LNK[:, i_M, k_M] - now_LN[:, i_M]
            added_M = self.instance.nbytes_NK[i_M, k_M] - self.instance.at(self.instance.nbytes_NK, choice_N)[i_M]
            d_L, free = now_LN.sum(axis=1), self.budget - self.instance.size(choice_N)
            for size in sizes:
                place_SC = np.indices((len(i_M),) * size).reshape(size, -1)  # C changes of `size` places
                d_LC = d_L[:, None] + change_LM[:, place_SC].sum(axis=1)
                allowed_C = added_M[place_SC].sum(axis=0) <= free
                if size == 2:
                    allowed_C &= i_M[place_SC[0]] != i_M[place_SC[1]]
                if self.limited is not None:
                    allowed_C &= d_LC[self.limited] <= self.limit
                worst_C = np.where(allowed_C, d_LC.max(axis=0), np.inf)
                best_S = place_SC[:, worst_C.argmin()]
                if worst_C.min() < d_L.max() * (1 - 1e-12):
                    choice_N[i_M[best_S]] = k_M[best_S]
                    break
            else:
                return choice_N
