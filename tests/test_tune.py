from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitalloc import tune as stage
from bitalloc.config import Tune
from bitalloc.families import FAMILIES
from tests.small import Small, small, tokens

FAST = Tune(iterations=6, polish=3, batch=2)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def run(bench: Small, settings: Tune = FAST, plan: int = 0):
    return stage.tune(
        name="tuned-x",
        plan=bench.random_plan(plan),
        tokens=tokens(),
        inventory=bench.inventory,
        experiments=bench.experiments,
        settings=settings,
        seed=0,
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    bench = small(family, tmp_path)
    frame = run(bench)
    print(frame.drop(columns=["key", "plan"]).to_string())
