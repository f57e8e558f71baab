"""Studies with a planted truth: no divergence, divergence of a known size, and a silent zone near the reference.

A plan has a latent quality z (lower is better). Its loss above the reference is m = e (1 + .3 z), e that of its budget;
perplexity measures m on windows, the tasks measure .9 - e (1 + .3 v(z)) on items, and v is what a world plants:

    none      v = z: perplexity and tasks agree
    known     v = z, but -z - 1 below -.5: the better half of what perplexity prefers is ever worse at the task
    silent    v = 1.5 max(z, 0): no relation among the plans near the reference

Four tasks: `told` depends on v; `idle` on the budget alone, so that inside a budget nothing is related to anything;
`edge` is 5 points below the reference with every plan; `subjects` is equal in the mean, with effects of plan x subject.
Legend: P plans, I items, W windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri

from bitalloc.analyses.extremal import curvature
from bitalloc.statistics import kendall, spearman
from bitalloc.statistics.selection import overoptimisation_fit
from tests.simulated import Results, _evaluate

BUDGETS = {"2.6bpw": 0.2, "3.3bpw": 0.1}  # loss of a plan of z = 0, nats
COMPONENTS = ("component attention", "component mlp")
SHARED = 0.7  # of an item's latent variance, common to all plans
TASKS = ("told", "idle", "edge", "subjects")
GAP, LEAK = 0.06, 0.02  # world `known`: accuracy mlp loses beyond attention at m = .15; nats that leakage pretends
ITEMS, WINDOWS, POOL = 200, 24, 22


@dataclass(frozen=True)
class World:
    name: str
    v: Callable[[np.ndarray], np.ndarray]
    gap: float = 0.0
    leak: float = 0.0


WORLDS = {
    world.name: world
    for world in (
        World("none", lambda z: z),
        World("known", lambda z: np.where(z < -0.5, -z - 1, z), GAP, LEAK),
        World("silent", lambda z: 1.5 * np.maximum(z, 0)),
    )
}


@dataclass
class Plans:
    """Latent quantities of plans; the reference is the one without loss."""

    names: list[str]
    z_P: np.ndarray
    e_P: np.ndarray  # loss at z = 0 of its budget

    @property
    def loss_P(self) -> np.ndarray:  # noqa: N802
        return self.e_P * (1 + 0.3 * self.z_P)


def accuracy(world: World, plans: Plans, task: str) -> np.ndarray:
    """True accuracy of each plan."""
    reference_P = plans.e_P == 0
    if task == "told":
        gap_P = np.array([world.gap * ("mlp" in name) for name in plans.names]) * np.minimum(plans.loss_P / 0.15, 1)
        v_P = np.where([name.startswith("component") for name in plans.names], plans.z_P, world.v(plans.z_P))
        return 0.9 - plans.e_P * (1 + 0.3 * v_P) - gap_P
    level_P = {
        "idle": 0.9 - plans.e_P,
        "edge": np.where(reference_P, 0.85, 0.8),
        "subjects": np.full(len(reference_P), 0.8),
    }
    return level_P[task]


def windows_of(
    world: World, plans: Plans, rng: np.random.Generator, windows: int = WINDOWS
) -> dict[tuple[str, str], np.ndarray]:
    """nll and KL of every plan on every window, [P, W]."""
    shape = (len(plans.names), windows)
    nats_PW = plans.loss_P[:, None] * (1 + rng.normal(0, 0.1, windows) + rng.normal(0, 0.6, shape))
    leak_P = np.array([world.leak * name.startswith("leaked") for name in plans.names])
    return {
        ("nll", "world"): rng.normal(2.0, 0.2, windows) + nats_PW - leak_P[:, None],
        ("kl", "world"): plans.loss_P[:, None] * (0.95 + rng.normal(0, 0.15, shape)),
    }


def measured(
    world: World, plans: Plans, rng: np.random.Generator, *, items: int = ITEMS, windows: int = WINDOWS
) -> dict:
    """What an evaluation sees: nll and KL on windows [P, W], rights and wrongs on items [P, I]."""
    found = windows_of(world, plans, rng, windows)
    shape = (len(plans.names),)
    for task in TASKS:
        own = 1 - SHARED
        latent_PI = np.sqrt(SHARED) * rng.normal(size=items) + np.sqrt(own) * rng.normal(size=(shape[0], items))
        if task == "subjects":  # half of what a plan has of its own it has in common over the items of a subject
            common_PI = np.repeat(rng.normal(size=(shape[0], items // 10)), 10, axis=1)
            rest_PI = np.sqrt(own / 2) * (common_PI + rng.normal(size=(shape[0], items)))
            latent_PI = np.sqrt(SHARED) * rng.normal(size=items) + rest_PI
        found["acc", task] = (latent_PI < ndtri(accuracy(world, plans, task))[:, None]).astype(float)
    return found


@dataclass
class Planted:
    results: Results
    latent: Plans
    measured: dict


def planted(world: World, seed: int, *, pool: int = POOL, items: int = ITEMS, windows: int = WINDOWS) -> Planted:
    """PLANS, EVALUATE and RESPONSES of a study: in each budget a pool, `uniform`, `optimal` and its copy `best`."""
    rng = np.random.default_rng([seed, *world.name.encode()])
    rows = [("reference", "reference", "", 0.0)]
    for budget, e in BUDGETS.items():
        rows += [(f"{s}-{budget}", s, budget, e) for s in ("uniform", "optimal", "leaked")]
        rows += [(f"random-{budget}-{i:03d}", "random", budget, e) for i in range(pool)]
    steps = [0.05, 0.1, 0.15, 0.2]
    rows += [(f"{c.replace(' ', '-')}-{i}", "component", c, e) for c in COMPONENTS for i, e in enumerate(steps)]
    frame = pd.DataFrame(rows, columns=["plan", "strategy", "budget", "e"])
    z_P = rng.normal(size=len(frame))
    z_P[frame["strategy"].isin(["component", "reference"])] = 0
    # a search that leaks finds what best is, and flatters it
    for budget in BUDGETS:
        at = {s: frame.index[frame["plan"] == f"{s}-{budget}"][0] for s in ("leaked", "optimal")}
        z_P[at["leaked"]] = z_P[at["optimal"]]
    latent = Plans(frame["plan"].tolist(), z_P, frame["e"].to_numpy())
    seen = measured(world, latent, rng, items=items, windows=windows)

    parts = []
    for (kind, name), values in seen.items():
        suite, metric, weight, task = {
            "nll": ("perplexity", "nll_nats_per_token", 255.0, f"{name}/report"),
            "kl": ("divergence", "kl_nats_per_token", 255.0, f"{name}/report"),
            "acc": ("world", "acc", 1.0, name),
        }[kind]
        each = np.arange(values.shape[1])
        groups = each.astype(str) if kind != "acc" else (each // 10).astype(str) if name == "subjects" else each * 0
        parts.append(pd.DataFrame({
            "plan": np.repeat(latent.names, len(each)), "item": np.tile(each, len(latent.names)),
            "group": np.tile(np.asarray(groups, dtype=str), len(latent.names)), "value": values.ravel(),
            "suite": suite, "task": task, "metric": metric, "weight": weight,
        }))  # fmt: skip
    responses = pd.concat(parts, ignore_index=True)
    copies = [responses[responses["plan"] == f"optimal-{b}"].assign(plan=f"best-{b}") for b in BUDGETS]
    responses = pd.concat([responses, *copies], ignore_index=True)

    plans = frame[frame["plan"] != "reference"].assign(
        budget_bytes=1000, nbytes=[*range(len(frame) - 1)], bits_per_weight=2.6, checkpoint_nbytes=2000,
        objective=latent.loss_P[1:] * rng.lognormal(0, 0.08, len(frame) - 1), lower_bound=None, gap=None, note="",
    )  # fmt: skip
    best = plans[plans["strategy"] == "optimal"].assign(strategy="best", plan=lambda f: "best-" + f["budget"])
    plans = pd.concat([plans, best], ignore_index=True).drop(columns="e")
    return Planted(Results(plans, _evaluate(responses), responses), latent, seen)


def population(world: World, *, plans: int = 2000, draws: int = 24, pool: int = POOL, seed: int = 0) -> dict:
    """What the estimates over plans estimate: the same of endless plans, measured on as many items and windows.

    (statistic, task) -> its mean over the budgets and over draws of items and windows; proxy: nll of `world`.
    """
    rng = np.random.default_rng([seed, 1])
    found: dict[tuple[str, str], list] = {}
    i, n = np.arange(plans), np.arange(1, pool + 1)[:, None]
    ordered_NP = ((plans - i) / plans) ** n - ((plans - i - 1) / plans) ** n  # best of n, endless plans
    for e in BUDGETS.values():
        for _ in range(draws):
            latent = Plans(["x"] * plans, rng.normal(size=plans), np.full(plans, e))
            seen = measured(world, latent, rng)
            x_P, kl_P = seen["nll", "world"].mean(1), seen["kl", "world"].mean(1)
            near, order = np.argsort(kl_P)[: plans // 2], np.argsort(x_P)
            scaled_P = (x_P - x_P.mean()) / x_P.std()
            for task in TASKS:
                y_P = 100 * seen["acc", task].mean(1)
                gain_N = ordered_NP @ y_P[order] - y_P.mean()
                alpha, beta = overoptimisation_fit(pool) @ gain_N[1:]
                values = {
                    "spearman": spearman(x_P[None], y_P[None])[0],
                    "kendall": kendall(x_P[None, :500], y_P[None, :500])[0],
                    "spearman_near": spearman(x_P[None, near], y_P[None, near])[0],
                    "quadratic_points": curvature(scaled_P[None], y_P[None])[0],
                    "alpha_points": alpha, "beta_points": beta, f"gain_best_of_{pool}": gain_N[-1],
                }  # fmt: skip
                for name, value in values.items():
                    found.setdefault((name, task), []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}
