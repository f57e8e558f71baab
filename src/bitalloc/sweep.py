"""The sweep: every claimed matrix under every option, in units that are the jobs of the workflow.

A unit is a block ("block-003"), a matrix ("block-003.q_proj") or one experiment
("block-003.q_proj.gptq-3b-g64-r8"). Planning units needs no torch, and no pandas, at every start of snakemake.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError, nearest
from bitalloc.families import Family
from bitalloc.option import Option, options
from bitalloc.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from bitalloc.store import Store


def units(family: Family, blocks: int, sweep: Sweep) -> list[str]:
    """Names of the units of a model, in the order of its blocks, roles and options.

    >>> from bitalloc.families import FAMILIES
    >>> units(FAMILIES["gpt2"], 2, Sweep(unit="layer"))
    ['block-000', 'block-001']
    >>> units(FAMILIES["gpt2"], 1, Sweep(unit="experiment", bits=[3], ranks=[0]))[0]
    'block-000.c_attn.gptq-3b-g128-r0'
    """
    names = [f"block-{block:03d}" for block in range(blocks)]
    if sweep.unit != "layer":
        names = [f"{name}.{role.name}" for name in names for role in family.roles]
    if sweep.unit == "experiment":
        names = [f"{name}.{option.name}" for name in names for option in options(sweep)]
    return names


def parse_unit(unit: str, family: Family, sweep: Sweep) -> tuple[list[str], list[Option]]:
    """(layers, options) of a unit. Raises `BitallocError` for a name that is no unit."""
    match = re.fullmatch(r"block-(\d{3,})(?:\.([^.]+))?(?:\.([^.]+))?", unit)
    if not match:
        raise BitallocError(f"{unit!r} is no unit of a sweep; write for example block-003 or block-003.q_proj")
    roles = {role.name: role for role in family.roles}
    if match[2] and match[2] not in roles:
        raise BitallocError(f"family {family.name!r} has no role {match[2]!r}: {nearest(match[2], roles)}")
    named = {option.name: option for option in options(sweep)}
    if match[3] and match[3] not in named:
        raise BitallocError(f"the sweep has no option {match[3]!r}: {nearest(match[3], named)}")
    layers = [family.layer(int(match[1]), role) for name, role in roles.items() if match[2] in (None, name)]
    return layers, [option for name, option in named.items() if match[3] in (None, name)]


def sweep(
    unit: str,
    *,
    path: Path,
    family: Family,
    inventory: pd.DataFrame,
    moments: pd.DataFrame,
    settings: Sweep,
    store: Store,
    device: torch.device,
) -> pd.DataFrame:
    """The errors [SWEEP] of one unit; every finished experiment is in the store at once.

    Says first how much of the whole sweep, and of this unit, is left to do.
    """
    from bitalloc.experiments import Experiments
    from bitalloc.models import Checkpoint

    layers, wanted = parse_unit(unit, family, settings)
    experiments = Experiments(
        checkpoint=Checkpoint(path, family),
        inventory=inventory,
        moments=moments,
        store=store,
        sweep=settings,
        device=device,
    )
    every = options(settings)
    there, total = experiments.stored(experiments.layers, every), len(experiments.layers) * len(every)
    mine = len(layers) * len(wanted)
    print(
        f"[sweep] {inventory['model'].iloc[0]}: {there:,} of {total:,} experiments are in the store, "
        f"{total - there:,} to do; {mine - experiments.stored(layers, wanted):,} of them in {unit}",
        file=sys.stderr,
        flush=True,
    )
    return experiments.rows(layers, wanted, Progress(f"sweep {unit}", mine))


def assemble(
    frames: Sequence[pd.DataFrame], *, inventory: pd.DataFrame, family: Family, settings: Sweep
) -> pd.DataFrame:
    """All units as one table [SWEEP], by block, role and option, however the work was cut into units.

    Raises `BitallocError` when an experiment is missing or strange to this configuration.
    """
    import pandas as pd

    from bitalloc.tables import SWEEP

    roles = [role.name for role in family.roles]
    claimed = inventory[inventory["claimed"]]
    layers = sorted(claimed.to_dict("records"), key=lambda row: (row["block"], roles.index(row["role"])))
    key = list(SWEEP.key)
    wanted = pd.DataFrame(
        [
            (row["model"], row["layer"], option.quantizer, option.bits, option.group_size, option.rank)
            for row in layers
            for option in options(settings)
        ],
        columns=key,
    )
    found = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=SWEEP.names)
    if found.duplicated(key).any():
        raise BitallocError("sweep: an experiment comes more than once; delete the tables of its units and rerun")
    merged = wanted.merge(found, on=key, how="outer", indicator=True)
    odd = merged[merged["_merge"] != "both"]
    if len(odd):
        first = odd.iloc[0]
        what = "is missing" if first["_merge"] == "left_only" else "is not asked for"
        raise BitallocError(
            f"sweep: {len(odd)} of {len(wanted)} experiments do not fit the configuration; {first['layer']} at "
            f"{first['bits']} bits, group {first['group_size']}, rank {first['rank']} {what}; rerun the sweep"
        )
    return wanted.merge(found, on=key, how="left")[SWEEP.names]
