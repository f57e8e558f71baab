"""A random model with made-up moments, ready for experiments, and plans for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, copytree

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save as to_bytes

from bitalloc import retrieve
from bitalloc.config import Sweep
from bitalloc.experiments import Experiments
from bitalloc.families import FAMILIES
from bitalloc.models import Checkpoint
from bitalloc.option import Option
from bitalloc.store import Store, digest
from tests.random_models import VOCABULARY, save

CPU = torch.device("cpu")
SWEEP = Sweep(quantizers=["rtn"], bits=[2, 3, 4, 16], group_sizes=[16], ranks=[0, 2])
OPTIONS = (Option("rtn", 2, 16, 0), Option("rtn", 3, 16, 2), Option("rtn", 4, 16, 0), Option("none", 16, 0, 0))


@dataclass
class Small:
    path: Path
    inventory: pd.DataFrame
    experiments: Experiments
    store: Store

    @property
    def layers(self) -> list[str]:
        return list(self.experiments.layers)

    def plan(self, options: Sequence[Option]) -> pd.DataFrame:
        """PLAN with the options in turn."""
        rows = []
        for place, (layer, row) in enumerate(self.experiments.layers.items()):
            option = options[place % len(options)]
            chosen = {name: getattr(option, name) for name in ("quantizer", "bits", "group_size", "rank")}
            nbytes = option.nbytes(row["rows"], row["columns"])
            rows.append(
                {"layer": layer, "block": row["block"], "role": row["role"], **chosen}
                | {"nbytes": nbytes, "cost_nats_per_token": 0.001 * place}
            )
        return pd.DataFrame(rows)

    def random_plan(self, seed: int) -> pd.DataFrame:
        draw = np.random.default_rng(seed).integers(len(OPTIONS), size=len(self.layers))
        return self.plan([OPTIONS[place] for place in draw])


def small(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    sweep: Sweep = SWEEP,
    seed: int = 0,
    source: Path | None = None,
) -> Small:
    """Saved in `dtype` under `folder`, or a copy of `source` there; the moments are those of white noise."""
    path, store = folder / "source", Store(folder / "store")
    if source:
        copytree(source, path, copy_function=copyfile)
    else:
        save(family, path, seed=seed)
    from safetensors.torch import load_file, save_file

    weights = path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    inventory = retrieve.inventory("small", path, FAMILIES[family])
    moments = []
    for site, columns in (
        inventory[inventory["claimed"]].drop_duplicates("site")[["site", "columns"]].itertuples(index=False)
    ):
        X_TI = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(columns))
        key = digest([site, columns])
        store.put(key, {}, to_bytes({"H_II": X_TI.T @ X_TI / len(X_TI)}))
        moments.append({"site": site, "key": key, "digest": key})
    experiments = Experiments(
        checkpoint=Checkpoint(path, FAMILIES[family]),
        inventory=inventory,
        moments=pd.DataFrame(moments),
        store=store,
        sweep=sweep,
        device=CPU,
    )
    return Small(path, inventory, experiments, store)


def tokens(windows: int = 12, length: int = 24) -> pd.DataFrame:
    """TOKENS of all splits, drawn at random."""
    rng = np.random.default_rng(0)
    rows = [
        {"split": split, "corpus": "noise", "window": window, "nbytes": 3 * length}
        | {"tokens": rng.integers(0, VOCABULARY, length).astype(np.int32)}
        for split in ("calibrate", "select", "report")
        for window in range(windows)
    ]
    return pd.DataFrame(rows)


def items(count: int = 12) -> pd.DataFrame:
    """ITEMS of one multiple-choice and one generation task, drawn at random."""
    rng = np.random.default_rng(1)

    def draw(size: int) -> list[int]:
        return rng.integers(0, VOCABULARY, size).tolist()

    rows = [
        {"task": task, "item": item, "group": "g", "prompt": draw(5), "choices": [draw(2) for _ in range(choices)]}
        | {"answer": 0, "chance": 1 / choices}
        for task, choices in (("choose", 4), ("say", 1))
        for item in range(count)
    ]
    return pd.DataFrame(rows)
