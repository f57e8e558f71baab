from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from bitalloc import compress as stage
from bitalloc.errors import BitallocError
from bitalloc.tables import CHECKPOINTS
from tests.small import Small, small


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small("llama", tmp_path_factory.mktemp("compress"))


def test_bytes_on_disk_are_the_promised_ones(bench: Small, tmp_path: Path) -> None:
    plans = {f"random-{seed}": bench.random_plan(seed) for seed in range(3)}
    frame = stage.compress(plans, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    assert frame["plan"].tolist() == list(plans)
    assert (frame["nbytes"] == frame["predicted_nbytes"]).all()
    assert frame["nbytes"].nunique() == frame["digest"].nunique() == 3
    for row in frame.itertuples():
        files = (tmp_path / row.path).glob("*.safetensors")
        assert row.path == f"models/{row.plan}"
        assert row.nbytes == sum(file.stat().st_size for file in files)
    CHECKPOINTS.write(frame, tmp_path / "checkpoints.parquet")
    again = stage.compress(plans, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory)
    assert again.equals(frame)


def test_a_broken_promise_stops(bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "checkpoint_nbytes", lambda *_: 1)
    with pytest.raises(BitallocError, match="its plan promised 1"):
        stage.compress(
            {"p": bench.random_plan(0)}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory
        )


def test_two_runs_write_a_checkpoint_one_after_the_other(
    bench: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compress(_: object = None) -> pd.DataFrame:
        return stage.compress(
            {"p": bench.random_plan(0)}, results=tmp_path, experiments=bench.experiments, inventory=bench.inventory
        )

    save, second, said = stage.checkpoints.save, [], threading.Event()
    monkeypatch.setattr("bitalloc.store.print", lambda line, **_: "waiting" in line and said.set(), raising=False)

    def slow(folder: Path, **how: object) -> None:
        if not second:
            second.append(ThreadPoolExecutor(1).submit(compress))
            assert said.wait(30)
            assert not folder.exists()
        save(folder, **how)

    monkeypatch.setattr(stage.checkpoints, "save", slow)
    first = compress()
    assert second[0].result(30).equals(first)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["p"]
