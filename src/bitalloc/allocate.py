"""Allocate: costs and budgets -> plans, each with the certificate of how far from the optimum it can be.

The objective of a plan is the sum over matrices of coefficient x rel_error (SENSITIVITY and COSTS), in nats a token.

Legend: N matrices, K options; `choice_N` holds an option index for each matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from bitalloc import precision
from bitalloc.budget import Budget, parse_budget
from bitalloc.config import SPOKEN, Allocate, Config, budget_slug, tuned_from
from bitalloc.errors import BitallocError
from bitalloc.families import FUSED
from bitalloc.formats.carried import carries
from bitalloc.formats.carried import nbytes as carried_nbytes
from bitalloc.formats.layout import checkpoint_nbytes, claim
from bitalloc.option import PASS_THROUGH, Option
from bitalloc.strategies import Choice, Instance, random, strategy
from bitalloc.strategies.component import components
from bitalloc.strategies.fair import Spoken
from bitalloc.strategies.optimal import Solution, gap, solve
from bitalloc.strategies.position import position

_OPTION = ["quantizer", "bits", "group_size", "rank"]
UNFUSED = "unfused"  # the optimum if nothing were fused; it never competes for `best`
_TRIES = 10  # solves or draws for each further plan that must differ from those before
_RESTRICTED = {"bits_only": "rank 0 only", "rank_only": "one quantizer, bits and group size; rank free"}
_KL, _NLL = ("divergence", "kl_nats_per_token"), ("perplexity", "nll_nats_per_token")


def build(
    costs: pd.DataFrame,
    sensitivity: pd.DataFrame,
    inventory: pd.DataFrame,
    config: Config,
    embeddings: pd.DataFrame | None = None,
) -> Instance:
    """The knapsack of one model: matrices in the order of the inventory, then what EMBEDDINGS offers, apart.

    Raises `BitallocError` when the tables do not cover the same matrices or disagree on bytes.
    """
    claimed = inventory[inventory["claimed"]].set_index("layer")
    signal = config.sensitivity.signal
    coefficient = sensitivity[sensitivity["signal"] == signal].set_index("layer")["coefficient"]
    for name, layers in (("costs", set(costs["layer"])), (f"sensitivity by {signal}", set(coefficient.index))):
        if off := sorted(layers ^ set(claimed.index)):
            raise BitallocError(f"{name} and inventory differ in {off[0]} ({len(off)} matrices); repeat that stage")
    sweep, form = config.sweep, config.format
    costs = costs.assign(cost=costs["layer"].map(coefficient).to_numpy() * costs["rel_error"].to_numpy())
    if embeddings is not None:
        costs = pd.concat([costs, embeddings.assign(cost=embeddings["kl_nats_per_token"])], ignore_index=True)
        inventory = claim(inventory, embeddings["layer"])
        claimed = inventory[inventory["claimed"]].set_index("layer")
    places = costs[_OPTION].drop_duplicates().itertuples(index=False, name=None)
    options = sorted(
        Option(*place) if place[0] == PASS_THROUGH else Option(*place, sweep.factor_bits, sweep.symmetric)
        for place in places
    )
    column = {(o.quantizer, o.bits, o.group_size, o.rank): k for k, o in enumerate(options)}
    row = {layer: i for i, layer in enumerate(claimed.index)}
    apart_N = claimed["kind"].isin(["embedding", "head"]).to_numpy()
    i = costs["layer"].map(row).to_numpy()
    k = np.array([column[place] for place in costs[_OPTION].itertuples(index=False, name=None)])
    nbytes_NK = np.zeros((len(row), len(options)), dtype=np.int64)
    costs_NK = np.full(nbytes_NK.shape, np.inf)
    sides = claimed[["rows", "columns"]].to_numpy()
    for matrix, place, nbytes, cost in zip(i, k, costs["nbytes"], costs["cost"], strict=True):
        option = options[place]
        if option.nbytes(*sides[matrix]) != nbytes:
            layer = claimed.index[matrix]
            raise BitallocError(f"{layer} at {option.name}: costs and configuration differ in bytes; resweep")
        if carries(form, option, table=apart_N[matrix]):
            nbytes_NK[matrix, place] = carried_nbytes(form, option, *sides[matrix])
            costs_NK[matrix, place] = cost
    weights_N = sides.prod(axis=1, dtype=np.int64)
    return Instance(tuple(row), tuple(options), weights_N, nbytes_NK, costs_NK, apart_N)


def units(place: pd.DataFrame, groups: Sequence[str]) -> NDArray[np.int64]:
    """The unit of each matrix: one for the matrices of a group of `families.FUSED` in a block, else its own.

    >>> roles = ["q_proj", "k_proj", "o_proj", "q_proj"]
    >>> units(pd.DataFrame({"layer": list("abcd"), "block": [0, 0, 0, 1], "role": roles}), ["qkv"]).tolist()
    [0, 0, 1, 2]
    """
    group = {role: name for name in groups for role in FUSED[name]}
    keys = [(row.block, group[row.role]) if row.role in group else row.layer for row in place.itertuples()]
    return pd.factorize(pd.Series(keys, dtype=object))[0]


def allocate(  # noqa: PLR0917 - tables and settings
    costs: pd.DataFrame,
    sensitivity: pd.DataFrame,
    inventory: pd.DataFrame,
    config: Config,
    embeddings: pd.DataFrame | None = None,
    leaked: pd.DataFrame | None = None,
    languages: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """PLANS frame and plan name -> PLAN frame: all budgets x strategies, runners-up, the random pool, and the arms.

    `lower_bound` is that of the joint problem, so every plan's gap tells how far it can be from the best. Groups
    that are to be fused take one option together; the plan `unfused` then shows what that costs. `embeddings`, an
    EMBEDDINGS frame, puts the embedding and a head of its own into the same budgets. A control (`bits_only`,
    `rank_only`) that the options do not allow is left out, and the note of `optimal` says why. `leaked`, a SENSITIVITY
    frame of the report windows, gives the candidates `leaked_1`, `leaked_2` .. of the arm of that name. `languages`,
    a LANGUAGES frame, is what the strategies `fair` and `english` go by.
    """
    settings = config.allocate
    whole = build(costs, sensitivity, inventory, config, embeddings)
    searched = None if leaked is None else build(costs, leaked, inventory, config, embeddings)
    stored, inventory = inventory, claim(inventory, whole.layers)
    place = inventory[inventory["claimed"]][["layer", "block", "role", "kind"]].reset_index(drop=True)
    place["role"] = place["role"].mask(place["role"] == "", place.pop("kind"))  # embedding and head play their own
    unit_N = units(place, config.fuse)
    instance = whole.fused(unit_N)
    seen = None if searched is None else searched.fused(unit_N)
    spoken = None if languages is None else _spoken(languages, costs, stored, config, unit_N)
    budgets = [parse_budget(text, instance, inventory, config.sweep, config.format) for text in settings.budgets]
    if twice := [b.text for b in budgets if [c.slug for c in budgets].count(b.slug) > 1]:
        raise BitallocError(f"allocate.budgets names {twice[0]!r} twice; remove one")
    for name in settings.strategies:
        if name not in SPOKEN:
            strategy(name)
    rows, frames = [], {}
    for budget in budgets:
        solution = solve(instance, budget.nbytes)
        choices = [
            (name, plan, choice_U[unit_N], note)
            for name, plan, choice_U, note in _choices(instance, budget, solution, config, leaked=seen, spoken=spoken)
        ]
        if config.fuse:
            free_N, fused = solve(whole, budget.nbytes).choice_N, instance.objective(solution.choice_N)
            saved = 1 - whole.objective(free_N) / fused if fused else 0.0
            note = f"optimal without fusing {' and '.join(config.fuse)}: predicted cost {100 * saved:.1f} % lower"
            choices.append((UNFUSED, f"{UNFUSED}-{budget.slug}", free_N, note))
        for name, plan, choice_N, note in choices:
            frames[plan] = _plan(whole, place, choice_N)
            rows.append(
                {
                    **{"plan": plan, "strategy": name, "budget": budget.text, "budget_bytes": budget.nbytes},
                    **_measures(whole, choice_N, checkpoint_nbytes(inventory, frames[plan], config.sweep)),
                    "lower_bound": solution.lower_bound,
                    "gap": gap(whole.objective(choice_N), solution.lower_bound),
                    "note": note,
                }
            )
    apart = _components(whole, place, inventory, config) if "component" in settings.arms else ()
    for row, frame in itertools.chain(apart, _free(stored, config)):
        if row["plan"] in frames:
            raise BitallocError(f"two plans are named {row['plan']}; rename one of the files in allocate.plans")
        rows.append(row)
        frames[row["plan"]] = frame
    return pd.DataFrame(rows), frames


def _measures(instance: Instance, choice_N: Choice, checkpoint: int) -> dict[str, Any]:
    nbytes = instance.size(choice_N)
    return {
        "nbytes": nbytes,
        "bits_per_weight": instance.bits_per_weight(nbytes),
        "checkpoint_nbytes": checkpoint,
        "objective": instance.objective(choice_N),
    }


def _components(
    instance: Instance, place: pd.DataFrame, inventory: pd.DataFrame, config: Config
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """A row of PLANS and a PLAN for each step of harm in each component; the others keep 16 bits, swept or not.

    Such a plan is at no equal-byte budget: it reads `component attention`, its bytes are the plan's own.
    """
    place_N = inventory[inventory["claimed"]].set_index("layer").loc[list(instance.layers)]
    kind = place_N["kind"].replace({"head": "embedding"}).tolist()  # what stands apart is one component
    whole = _with_reference(instance, place_N[["rows", "columns"]].to_numpy(), config.format)
    count: dict[str, int] = {}
    for name, choice_N in components(whole, kind):
        count[name] = count.get(name, 0) + 1
        frame = _plan(whole, place, choice_N)
        option = whole.options[choice_N[kind.index(name)]]
        measures = _measures(whole, choice_N, checkpoint_nbytes(inventory, frame, config.sweep))
        yield (
            {
                "plan": f"component-{name}-{count[name]}",
                "strategy": "component",
                "budget": f"component {name}",
                "budget_bytes": measures["nbytes"],
                **measures,
                "lower_bound": math.nan,
                "gap": math.nan,
                "note": f"{option.name} in {kind.count(name)} of {len(kind)} matrices, the others untouched",
            },
            frame,
        )


def _free(inventory: pd.DataFrame, config: Config) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """A row of PLANS and a PLAN for each rule by position and each precision map of the user's.

    They keep to no budget and round the embedding too, whatever the sweep offers; what they cost is unknown.
    """
    known = precision.components(inventory)
    blocks = int(inventory["block"].max()) + 1
    asked: list[tuple[str, str, dict[str, str] | Path]] = [
        ("position", f"position-{rule}", position(rule, blocks)) for rule in config.allocate.rules
    ]
    asked += [("file", Path(file).stem, Path(file)) for file in config.allocate.plans]
    for name, plan, given in asked:
        mapping = precision.parse(given, known)
        frame = precision.plan(inventory, mapping)
        sides = claim(inventory, frame["layer"]).query("claimed")[["rows", "columns"]]
        nbytes = int(frame["nbytes"].sum())
        yield (
            {
                **{"plan": plan, "strategy": name, "budget": name, "budget_bytes": nbytes, "nbytes": nbytes},
                "bits_per_weight": 8 * nbytes / int(sides.prod(axis=1).sum()),
                "checkpoint_nbytes": checkpoint_nbytes(inventory, frame, config.sweep),
                **dict.fromkeys(("objective", "lower_bound", "gap"), math.nan),
                "note": ", ".join(f"{key} {value}" for key, value in precision.compact(mapping).items()),
            },
            frame,
        )


def _with_reference(instance: Instance, sides_N2: NDArray[np.int64], form: str) -> Instance:
    """The problem with 16 bits for every matrix; an embedding has them if they were measured."""
    through, added = Option(PASS_THROUGH, 16, 0, 0), ((0, 0), (0, 1))
    options, nbytes_NK, costs_NK = instance.options, instance.nbytes_NK.copy(), instance.costs_NK.copy()
    if through not in options:
        options = (*options, through)
        nbytes_NK, costs_NK = np.pad(nbytes_NK, added), np.pad(costs_NK, added, constant_values=np.inf)
    k = options.index(through)
    for i in np.flatnonzero(~instance.apart_N & ~np.isfinite(costs_NK[:, k])):
        nbytes_NK[i, k], costs_NK[i, k] = carried_nbytes(form, through, *map(int, sides_N2[i])), 0.0
    return replace(instance, options=options, nbytes_NK=nbytes_NK, costs_NK=costs_NK)


def _choices(
    instance: Instance,
    budget: Budget,
    solution: Solution,
    config: Config,
    *,
    leaked: Instance | None,
    spoken: Spoken | None,
) -> Iterator[tuple[str, str, Choice, str]]:
    """(strategy, plan name, choice, note) of everything that is made for one budget."""
    settings, draw = config.allocate, [config.seed, *budget.slug.encode()]
    found, refused = {}, []
    for name in settings.strategies:
        if name == "optimal":
            found[name] = solution.choice_N, ""
        elif name == "uniform":
            found[name] = _uniform(instance, budget)
        elif name in SPOKEN:
            if spoken is None:
                raise BitallocError(f"the strategy {name} needs LANGUAGES, what every matrix costs each language")
            found[name] = spoken.choose(name, instance, budget.nbytes, ignoring=solution.choice_N)
        else:
            try:
                choice_N = strategy(name)(instance, budget.nbytes, seed=config.seed)
            except BitallocError as error:
                if name not in _RESTRICTED:
                    raise
                refused.append(f"no {name}: {error}")
            else:
                found[name] = choice_N, _RESTRICTED.get(name, "")
    for name, (choice_N, note) in found.items():
        yield name, f"{name}-{budget.slug}", choice_N, "; ".join(refused) if name == "optimal" else note
    note = f"optimal for coefficients jittered by {settings.jitter:g} (log-normal)"
    for rank, choice_N in enumerate(_runners_up(instance, budget, solution, settings, draw)):
        yield f"optimal_{rank + 2}", f"optimal_{rank + 2}-{budget.slug}", choice_N, note
    if leaked is not None:  # the same search with what the report windows say
        solution = solve(leaked, budget.nbytes)
        for rank, choice_N in enumerate(
            [solution.choice_N, *_runners_up(leaked, budget, solution, settings, draw)], start=1
        ):
            yield f"leaked_{rank}", f"leaked_{rank}-{budget.slug}", choice_N, "coefficients of the report windows"
    for serial, choice_N in enumerate(_pool(instance, budget, settings, draw)):
        yield "random", f"random-{budget.slug}-{serial:03d}", choice_N, ""


def _spoken(
    languages: pd.DataFrame, costs: pd.DataFrame, inventory: pd.DataFrame, config: Config, unit_N: NDArray[np.int64]
) -> Spoken:
    """Predicted relative damage of every option to each language above its floor: coefficient x rel_error / its NLL.

    Raises `BitallocError` when no language is above its floor, and where the embedding has options.
    """
    if config.sweep.embedding_bits != [16]:
        raise BitallocError(
            f"{' and '.join(SPOKEN)} cannot choose an embedding: what it costs each language is not "
            "measured; set sweep.embedding_bits to [16]"
        )
    found = {
        str(language): build(costs, rows, inventory, config).fused(unit_N).costs_NK
        / rows["reference_nll_nats_per_token"].iloc[0]
        for language, rows in languages[~languages["floor"]].groupby("language", sort=False)
    }
    return Spoken(found, config.fairness.margin_en)


def _uniform(instance: Instance, budget: Budget) -> tuple[Choice, str]:
    """The option that the budget names, if it was offered to all; else the best uniform plan that fits."""
    choice_N = strategy("uniform")(instance, budget.nbytes)
    best = instance.options[choice_N[0]]
    if budget.option in instance.options and budget.option != best:
        most_N = np.where(np.isfinite(instance.costs_NK), instance.nbytes_NK, -1).argmax(axis=1)
        named_N = np.where(instance.apart_N, most_N, instance.options.index(budget.option))
        if np.isfinite(instance.objective(named_N)):
            return named_N, f"{budget.option.name}, as the budget says; {best.name} fits too and costs less"
    return choice_N, best.name


def _runners_up(
    instance: Instance, budget: Budget, solution: Solution, settings: Allocate, draw: list[int]
) -> list[Choice]:
    """Up to `runners_up` plans that differ from the optimum and from one another, by rising objective."""
    rng = np.random.default_rng(draw)
    found = {solution.choice_N.tobytes(): solution.choice_N}
    for _ in range(_TRIES * settings.runners_up):
        if len(found) > settings.runners_up:
            break
        factor_N = np.exp(settings.jitter * rng.normal(size=len(instance.layers)))
        choice_N = solve(instance.reweighted(factor_N), budget.nbytes).choice_N
        found.setdefault(choice_N.tobytes(), choice_N)
    return sorted(list(found.values())[1:], key=instance.objective)


def _pool(instance: Instance, budget: Budget, settings: Allocate, draw: list[int]) -> list[Choice]:
    """Up to `pool` distinct random plans that fill the budget; fewer where fewer exist."""
    found: dict[bytes, Choice] = {}
    for serial in range(_TRIES * settings.pool):
        if len(found) == settings.pool:
            break
        choice_N = random.random(instance, budget.nbytes, seed=[*draw, serial], slack=settings.pool_slack)
        if instance.size(choice_N) >= (1 - settings.pool_slack) * budget.nbytes:
            found.setdefault(choice_N.tobytes(), choice_N)
    return list(found.values())


def _plan(instance: Instance, place: pd.DataFrame, choice_N: Choice) -> pd.DataFrame:
    chosen = [instance.options[k] for k in choice_N]
    return place.assign(
        **{name: [getattr(option, name) for option in chosen] for name in _OPTION},
        nbytes=instance.at(instance.nbytes_NK, choice_N),
        cost_nats_per_token=instance.at(instance.costs_NK, choice_N),
    )


def choose_best(
    plans: pd.DataFrame, frames: Mapping[str, pd.DataFrame], evaluate: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """PLANS rows and PLAN frames of `best-<budget>`: the candidate of least KL to the reference on the select split.

    Candidates are the optimal plan, the runners-up and the uniform plan of the budget, so that what ships is not
    worse than uniform. The KL is the mean over the corpora of metric kl_nats_per_token, suite divergence; of equals
    the smaller plan wins. Raises `BitallocError` when a candidate was not evaluated.
    """
    return _choose(plans, frames, evaluate, "best", candidates=r"optimal(_\d+)?|uniform", split="select", by=_KL)


def choose_leaked(
    plans: pd.DataFrame, frames: Mapping[str, pd.DataFrame], evaluate: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """PLANS rows and PLAN frames of `leaked-<budget>`: the candidate of least NLL on the very windows of the report.

    Candidates are `leaked_<n>` and those of `best`, so that on these windows no `best` has a lower NLL.
    """
    return _choose(
        plans, frames, evaluate, "leaked", candidates=r"(leaked|optimal)(_\d+)?|uniform", split="report", by=_NLL
    )


def _choose(
    plans: pd.DataFrame,
    frames: Mapping[str, pd.DataFrame],
    evaluate: pd.DataFrame,
    title: str,
    *,
    candidates: str,
    split: str,
    by: tuple[str, str],
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Rows and frames of `<title>-<budget>`, the candidate whose score `by` (suite, metric) is least on the split."""
    (suite, metric), word = by, by[1].partition("_")[0].upper()
    scores = evaluate[
        (evaluate["suite"] == suite) & (evaluate["metric"] == metric) & evaluate["task"].str.endswith(f"/{split}")
    ]
    score = scores.pivot(index="plan", columns="task", values="value").mean(axis=1, skipna=False).to_dict()
    rows, chosen = [], {}
    for budget, group in plans[plans["strategy"].str.fullmatch(candidates)].groupby("budget", sort=False):
        entrants = group.assign(score=group["plan"].map(score).astype(float))
        if entrants["score"].isna().any():
            plan = entrants.loc[entrants["score"].isna(), "plan"].iloc[0]
            raise BitallocError(f"{plan} has no {suite} on every corpus of the {split} split; evaluate it there")
        winner = entrants.sort_values(["score", "nbytes", "plan"]).iloc[0]
        uniform = entrants.loc[entrants["strategy"] == "uniform", "score"]
        against = f" (uniform {uniform.iloc[0]:.4g})" if len(uniform) else ""
        name = f"{title}-{budget_slug(budget)}"
        note = f"won by {winner['strategy']} on the {split} split: {word} {winner['score']:.4g}{against}"
        rows.append({**winner[plans.columns].to_dict(), "plan": name, "strategy": title, "note": note})
        chosen[name] = frames[winner["plan"]]
    return pd.DataFrame(rows, columns=plans.columns), chosen


def tuned(
    plans: pd.DataFrame, frames: Mapping[str, pd.DataFrame], strategies: Sequence[str]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """PLANS rows and PLAN frames of what compress.plans wants tuned: `tuned` copies `best`, `tuned_<name>` that one.

    Bytes and options are those of the plan it copies; its codes are learned when it is compressed. Raises
    `BitallocError` for a strategy that has no plan at a budget.
    """
    rows, chosen = [], {}
    named = plans[plans["strategy"] != "random"]
    for title in strategies:
        if (source := tuned_from(title)) is None:
            continue
        copied = named[named["strategy"] == source]
        if short := sorted(set(named.loc[named["strategy"] == "best", "budget"]) - set(copied["budget"])):
            raise BitallocError(
                f"compress.plans has {title!r}, but there is no plan {source!r} at {short[0]}; "
                "add it to allocate.strategies or remove it"
            )
        for row in copied.to_dict("records"):
            name = f"{title}-{budget_slug(row['budget'])}"
            note = f"the map of {row['plan']}, codes learned (tune)"
            rows.append({**row, "plan": name, "strategy": title, "note": note})
            chosen[name] = frames[row["plan"]]
    return pd.DataFrame(rows, columns=plans.columns).astype(plans.dtypes), chosen


def write_overrides(plan: pd.DataFrame, row: Mapping[str, Any]) -> str:
    """The plan as YAML for people: its row of PLANS as comments, then layer: {quantizer, bits, group_size, rank}."""
    head = [f"# {name}: {row[name]}" for name in row if not pd.isna(row[name]) and row[name] != ""]
    lines = [
        yaml.safe_dump({layer: options}, default_flow_style=None, sort_keys=False, width=1000).rstrip()
        for layer, options in plan.set_index("layer")[_OPTION].to_dict("index").items()
    ]
    return "\n".join([*head, *lines]) + "\n"
