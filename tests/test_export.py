"""Every format of other software: what is asked of all of them when something is wrong."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bitalloc.config import Sweep
from bitalloc.errors import BitallocError
from bitalloc.export import FORMATS, export
from bitalloc.option import Option
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


def command(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess:
    """`python -m bitalloc.export`, in which no file may grow beyond `limit` bytes."""

    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = [sys.executable, "-m", "bitalloc.export", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, preexec_fn=before)


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
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_stays(name: str, checkpoint: Path, tmp_path: Path) -> None:
    done = command(checkpoint, tmp_path / "target", "--to", name, limit=100_000)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert f"cannot write {tmp_path / 'target'}" in line and "free space" in line
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "source", "store", "wide"]
