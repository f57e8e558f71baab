"""Every format of other software: what is asked of all of them when something is wrong."""

from __future__ import annotations

import resource
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

from bitalloc import export as export_module
from bitalloc.allocate import allocate
from bitalloc.config import Sweep, parse
from bitalloc.errors import BitallocError
from bitalloc.export import FORMATS, export
from bitalloc.formats import gguf
from bitalloc.formats.bitalloc import Reader
from bitalloc.option import Option, options
from tests.formats.test_bitalloc import save
from tests.formats.test_gptq import wide
from tests.small import small

EVERY = pytest.mark.parametrize("name", list(FORMATS))
SWEEP = Sweep(quantizers=["rtn"], bits=[4], group_sizes=[32], ranks=[0])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    bench = small("llama", tmp_path, sweep=SWEEP, source=wide("llama", tmp_path / "wide"))
    save(bench, tmp_path / "plan", bench.plan([Option("rtn", 4, 32, 0)]))
    return tmp_path / "plan"


def command(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m bitalloc.export` in this process, whose imports are behind it; raises SystemExit where that fails."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    runpy.run_path(str(export_module.__file__), run_name="__main__")


@EVERY
def test_a_truncated_or_flipped_source_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    for harm in (lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        file = checkpoint / "block-00001.safetensors"
        data = file.read_bytes()
        file.write_bytes(harm(data))
        with pytest.raises(BitallocError, match="missing, truncated or damaged; delete the folder and rerun"):
            export(checkpoint, tmp_path / "target", name=name)
        file.write_bytes(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "source", "store", "wide"]


@EVERY
def test_what_stands_there_already_stays(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(BitallocError, match="target exists; delete it or write elsewhere"):
        export(checkpoint, tmp_path / "target", name=name)
    assert (tmp_path / "target").read_text() == "mine"


@EVERY
def test_above_its_budget_nothing_is_written(name: str, checkpoint: Path, tmp_path: Path) -> None:
    nbytes = int(export(checkpoint, tmp_path / "first", name=name)["nbytes"].item())
    with pytest.raises(BitallocError, match=f"takes {nbytes} bytes as {name}, 1 above its budget"):
        export(checkpoint, tmp_path / "second", name=name, limit=nbytes - 1)
    assert not (tmp_path / "second").exists()
    export(checkpoint, tmp_path / "second", name=name, limit=nbytes)


@EVERY
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_stays(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python 3.11 would keep what is cut short of it
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # bytes beyond which no file may grow
    try:
        with pytest.raises(SystemExit, match=r"^1$"):
            command(checkpoint, tmp_path / "target", "--to", name, monkeypatch=monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path / 'target'}") and "free space" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "source", "store", "wide"]


def test_the_command_exports_and_says_so(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    arguments = (checkpoint, tmp_path / "target", "--to", "huggingface")
    command(*arguments, monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("bytes, as computed before") == 1
    with pytest.raises(SystemExit, match=r"^1$"):
        command(*arguments, monkeypatch=monkeypatch)
    assert capsys.readouterr().err.count("\n") == 1


# ---- budgets in the bytes of a format ------------------------------------------------------------------
def planned(folder: Path, name: str, budget: str) -> tuple[pd.Series, Reader]:
    """The optimal plan of a random model for a budget in the bytes of the format, and its checkpoint."""
    sweep = {"quantizers": ["rtn"], "bits": [2, 4, 8], "group_sizes": [32], "ranks": [0, 2], "iterations": 0}
    bench = small("llama", folder, sweep=Sweep(**sweep), source=wide("llama", folder / "wide", hidden=64))
    config = parse({"sweep": sweep, "allocate": {"budgets": [budget], "pool": 1, "format": name}})
    errors = bench.experiments.rows(bench.layers, options(config.sweep))
    sensitivity = errors.drop_duplicates("layer").assign(signal="kl", coefficient=range(1, len(bench.layers) + 1))
    plans, frames = allocate(errors.assign(source="measured"), sensitivity, bench.inventory, config)
    row = plans[plans["strategy"] == "optimal"].iloc[0]
    assert row["nbytes"] == frames[row["plan"]]["nbytes"].sum()
    save(bench, folder / "plan", frames[row["plan"]])
    return row, Reader(folder / "plan")


@pytest.mark.parametrize("name", ["huggingface", "gptq"])
def test_an_export_fills_the_budget_that_was_counted_in_its_bytes(name: str, tmp_path: Path) -> None:
    budget = 360_000  # the embedding and the head take 262,144
    row, _ = planned(tmp_path, name, str(budget))
    nbytes = int(export(tmp_path / "plan", tmp_path / "target", name=name, limit=budget)["nbytes"].item())
    # but for what the allocation left, only the header entries of tensors that a matrix may have are in reserve
    assert 0 <= budget - nbytes - (row["budget_bytes"] - row["nbytes"]) < 500 * 21
    assert row["budget_bytes"] - row["nbytes"] < 0.02 * budget


def test_gguf_bytes_are_those_of_its_types(tmp_path: Path) -> None:
    row, reader = planned(tmp_path, "gguf", "5.2bpw")
    weights = {f"{layer}.weight": plan["rows"] * plan["columns"] for layer, plan in reader.plan.items()}
    bits = {**gguf.BITS, "F16": 16.0}
    assert row["nbytes"] == sum(
        weights[entry.source] * bits[entry.type] / 8 for entry in gguf._entries(reader) if entry.source in weights
    )
    assert row["bits_per_weight"] <= 5.2


def test_a_format_that_has_no_place_for_rank_is_not_offered_any(tmp_path: Path) -> None:
    _, reader = planned(tmp_path, "gptq", "4.5bpw")
    assert not any(plan["rank"] for plan in reader.plan.values())
    with pytest.raises(BitallocError, match="gptq has no place for rtn-4b-g32-r2; leave the rank out"):
        planned(tmp_path / "again", "gptq", "uniform 4b r2")
