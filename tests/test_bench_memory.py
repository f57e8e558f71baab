"""The benchmark's stages at a tiny size: they run, and its numbers are those of the machine."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitalloc.errors import BitallocError
from bitalloc.tables import CHECKPOINTS, MOMENTS, SWEEP

SCRIPT = Path(__file__).parents[1] / "benchmarks/bench_memory.py"
BLOCKS = 3
ARGUMENTS = ["--shape", "small", "--blocks", str(BLOCKS), "--window", "32", "--ranks", "0", "4", "--threads", "1"]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(*more: str, folder: Path) -> dict[str, Any]:
    bench = runpy.run_path(str(SCRIPT))
    arguments = [*ARGUMENTS, *more, "--directory", str(folder / "made"), "--results", str(folder / "memory.json")]
    bench["run"](bench["parse"](arguments))
    return json.loads((folder / "memory.json").read_text())


def test_all_stages_run_and_are_measured(tmp_path: Path) -> None:
    told = run(folder=tmp_path)
    assert [row["stage"] for row in told["rows"]] == ["write", "retrieve", "calibrate", "sweep", "compress"]
    for row in told["rows"]:
        assert row["finished"]
        assert 1e8 < row["anonymous"] < min(row["resident"], row["allocated"]) < 8e9
    results = tmp_path / "made/results"
    assert len(MOMENTS.read(results / "moments.parquet")) == 4 * BLOCKS
    assert {*SWEEP.read(results / f"sweep-{BLOCKS - 1}.parquet")["block"]} == {BLOCKS - 1}
    [checkpoint] = CHECKPOINTS.read(results / "checkpoints.parquet").itertuples()
    assert checkpoint.nbytes == checkpoint.predicted_nbytes


def test_the_limit_holds(tmp_path: Path) -> None:
    with pytest.raises(BitallocError, match="write did not finish within 100MB"):
        run("--only", "write", "--limit", "100MB", folder=tmp_path)
    [row] = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert row["allocated"] <= 1e8


def test_a_disk_too_small_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(BitallocError, match=r"0\.0 GB of disk are missing; give a --directory") as caught:
        run(folder=tmp_path)
    assert "\n" not in str(caught.value)
