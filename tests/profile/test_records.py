"""Records: one content in two files, ids that follow from content, runs that are never mixed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bitalloc.errors import BitallocError
from bitalloc.profile import records
from bitalloc.profile.records import COLUMNS, METRICS, VARYING, Run, frame, read_jsonl, rows, run_id
from bitalloc.tables import RECORDS

ROW = {"stage": "profile", "model": "m", "variant": "reference", "metric": "ttft_ms", "status": "ok"}
ROW |= {"simulated": False, "device": "cpu", "seed": 0, "git_commit": "c", "host": "h", "versions": "v"}


def test_parquet_and_jsonl_hold_the_same_rows_and_absent_is_null(tmp_path: Path) -> None:
    found = [{**ROW, "value": 0.1 + 0.2, "n": 3, "batch": 2}, {**ROW, "metric": "ppl", "value": None, "w_bits": 4.5}]
    with Run(tmp_path / "r", {"model": {"name": "m"}}).held() as run:
        run.add(found)
    kept = read_jsonl(tmp_path / "r/metrics.jsonl")
    assert rows(RECORDS.read(tmp_path / "r/metrics.parquet")) == kept
    assert [row["value"] for row in kept] == [0.1 + 0.2, None] and kept[1]["batch"] is None
    assert list(kept[0]) == list(COLUMNS) and kept[0]["run_id"] == "r" and type(kept[0]["batch"]) is int


def test_not_a_number_is_absent_and_an_unknown_metric_is_refused() -> None:
    assert rows(frame([{**ROW, "value": math.nan}]))[0]["value"] is None
    with pytest.raises(BitallocError, match="unknown metric 'speed'"):
        frame([{**ROW, "metric": "speed"}])
    assert set(METRICS) >= VARYING and not VARYING & set(records.SCORES)


def test_the_id_follows_from_settings_model_and_seed_alone() -> None:
    settings = {"model": {"name": "m"}, "lengths": [1, 2]}
    one = run_id(settings, "weights", 0)
    assert one.startswith("m-") and one == run_id(dict(reversed(settings.items())), "weights", 0)
    others = [
        run_id(settings | {"lengths": [1]}, "weights", 0),
        run_id(settings, "x", 0),
        run_id(settings, "weights", 1),
    ]
    assert len({one, *others}) == 4


def test_a_run_is_gone_on_with_and_never_mixed(tmp_path: Path) -> None:
    with Run(tmp_path / "r", {"seed": 0, "model": "m"}).held() as run:
        run.add([ROW])
    with Run(tmp_path / "r", {"seed": 0, "model": "m"}).held() as run:
        assert run.has("profile", "reference") and not run.has("profile", "champion") and not run.has("perplexity")
        run.add([{**ROW, "variant": "champion"}])
    assert [row["variant"] for row in read_jsonl(tmp_path / "r/metrics.jsonl")] == ["reference", "champion"]
    with pytest.raises(BitallocError, match="is another run: seed differ"):
        Run(tmp_path / "r", {"seed": 1, "model": "m"})


def test_two_may_not_write_one_run_and_a_kill_between_its_files_is_mended(tmp_path: Path) -> None:
    run = Run(tmp_path / "r", {})
    with run.held():
        run.add([ROW])
        with pytest.raises(BitallocError, match="another process writes"), Run(tmp_path / "r", {}).held():
            pass
    (tmp_path / "r/metrics.parquet").unlink()
    with run.held():
        assert len(RECORDS.read(tmp_path / "r/metrics.parquet")) == 1


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"run_id": "r"}\n'])
def test_what_is_no_record_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(BitallocError, match="does not hold records"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_the_machine_is_told_without_a_gpu() -> None:
    found = records.machine("cpu")
    assert "torch 2.13.0" in found["versions"] and "gpu" not in found
