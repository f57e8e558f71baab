"""Runs by hand: one small file, the same rows twice, one line for what is wrong."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bitalloc import config
from bitalloc.errors import BitallocError
from bitalloc.profile import bench, memory, run
from bitalloc.profile.generation import Holder
from bitalloc.profile.records import METRICS, OK, SPREAD, VARYING, read_jsonl

ROOT = Path(__file__).parents[2]
ASKED: dict[str, Any] = {
    "model": str(ROOT / "resources/tiny"),
    "variants": ["reference", "w4a8+rtn"],
    "device": "cpu",
    "threads": 1,
    "calibrate": {"corpora": ["world"], "window": 32, "windows": 4},
    "perplexity": {"corpora": ["world"], "window": 64, "windows": 4, "stride": 32, "resamples": 50},
    "long_context": {"kind": "world", "lengths": [48], "depths": 2, "items": 2},
    "profile": {
        "lengths": [16], "batches": [1], "new_tokens": 3, "warmup": 1, "iterations": 2, "seconds": 0, "resamples": 50,
    },
}  # fmt: skip


class Here:
    """Stands in for the server of processes: holds variants in this one."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, _: str, *given: Any) -> Any:
        holder = Holder(*given)
        return SimpleNamespace(call=lambda method, *asked: getattr(holder, method)(*asked), close=lambda: None)


def asked(folder: Path, **over: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**ASKED, "store": str(folder / "store"), **over}))
    return path


def script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a script as a user calls it, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with all stages that was called as a user calls it."""
    home = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bench, "Server", lambda *_: Here())
        monkeypatch.setattr(memory.gc, "collect", lambda: 0)  # of all that tests have imported
        for name in ("eval_ppl", "eval_long_context", "profile_model"):
            given = ("--config", asked(home), "--runs", home / "runs")
            assert script(name, *given, monkeypatch=monkeypatch) == 0
    (found,) = (home / "runs").iterdir()
    return found


def test_all_stages_of_one_file_are_one_run(folder: Path) -> None:
    rows = read_jsonl(folder / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"perplexity", "long_context", "profile"}
    assert {row["run_id"] for row in rows} == {folder.name} and folder.name.startswith("tiny-")
    assert {row["variant"] for row in rows} == {"reference", "w4a8+rtn"}
    scheme = [row for row in rows if row["variant"] == "w4a8+rtn"]
    assert {(row["w_bits"], row["a_bits"], row["calib_method"], row["simulated"]) for row in scheme} == {
        (4.0, 8, "rtn", True)
    }
    ppl = {row["variant"]: row for row in rows if row["metric"] == "ppl"}
    assert ppl["reference"]["value"] < ppl["w4a8+rtn"]["value"] and ppl["reference"]["stride"] == 32
    assert next(row for row in rows if row["metric"] == "n_tokens")["value"] == 4 * 32
    resolved = yaml.safe_load((folder / "config_resolved.yaml").read_text())
    assert resolved["perplexity"]["split"] == "report" and len(resolved["model_digest"]) == 64
    keys = [row for row in rows if row["stage"] == "long_context"]
    assert all(row["template_hash"] and row["template_version"] for row in keys)
    assert {row["depth"] for row in keys} == {None, 0.0, 1.0} and {row["prompt_length"] for row in keys} == {48}


def test_a_second_run_gives_the_same_but_for_times(folder: Path, tmp_path: Path) -> None:
    again = run.measure(run.perplexity, config.read_run(asked(tmp_path)), tmp_path / "runs", "another")

    def kept(rows: list[dict]) -> list[dict]:
        gone = {True: {"run_id", *SPREAD}, False: {"run_id"}}
        chosen = [row for row in rows if row["stage"] == "perplexity"]
        return [{k: v for k, v in row.items() if k not in gone[row["metric"] in VARYING]} for row in chosen]

    assert kept(again.rows) == kept(read_jsonl(folder / "metrics.jsonl"))


def test_what_is_there_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "metrics.jsonl").read_bytes()
    (folder / ".variants.killed/models").mkdir(parents=True)

    def never(*_: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(run, "load", never)
    monkeypatch.setattr(bench, "profile", never)
    for name in (run.perplexity, run.long_context, run.profile):
        run.measure(name, config.read_run(folder.parents[1] / "run.yaml"), folder.parent)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not list(folder.glob(".variants.*")) and not (folder / ".lock").exists()


def test_another_configuration_does_not_get_into_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", str(asked(tmp_path, seed=1)), "--runs", str(folder.parent), "--run-id", folder.name]
    assert run.command(run.perplexity, "d", given) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "is another run: seed, store differ" in said and said.count("\n") == 1


def test_plots_need_records_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    assert script("make_plots", "--run-dir", copy, monkeypatch=monkeypatch) == 0
    assert sorted(path.stem for path in (copy / "plots").glob("*.png")) == ["long_context", "perplexity", "profile"]


def test_a_variant_that_cannot_run_here_is_a_row_that_says_so(tmp_path: Path) -> None:
    settings = config.read_run(asked(tmp_path, variants=["all_low:gptq"]))
    found = run.measure(run.perplexity, settings, tmp_path / "runs")
    assert {row["value"] for row in found.rows} == {None} and OK not in {row["status"] for row in found.rows}
    assert {row["metric"] for row in found.rows} <= set(METRICS)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"model": "tinny"}, "is no folder, no hub id and no row of config/models.yaml: did you mean 'tiny'"),
        ({"perplexity": {"widow": 3}}, "unknown key 'perplexity.widow': did you mean 'window'"),
        ({"perplexity": {"corpora": ["wrld"]}}, "unknown corpus 'wrld': did you mean 'world'"),
        ({"variants": ["w4a8+gptc"]}, "unknown technique 'gptc': did you mean 'gptq'"),
        ({"variants": ["champion:nativ"]}, "unknown backend 'nativ': did you mean 'native'"),
        ({"variants": ["chmpion:native"]}, "unknown plan 'chmpion' of a variant: did you mean 'champion'"),
        ({"variants": ["reference", "reference"]}, "variants: a variant stands there twice"),
        ({"profile": {"variants": ["reference"]}}, "unknown key 'profile.variants'"),
        ({"profile": {"priced_as": "a10"}}, "profile: no price of 'a10'"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"corpora": ["world"]}, "corpora: Input should be a valid dictionary"),
    ],
)
def test_a_faulty_configuration_is_one_line(
    over: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = ["--config", str(asked(tmp_path, **over)), "--runs", str(tmp_path / "runs")]
    assert run.command(run.perplexity, "d", given) == 1
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_run_id_that_is_no_name_and_files_that_are_not_there_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitalloc.profile import plots

    with pytest.raises(BitallocError, match="is no name of a folder"):
        run.measure(run.perplexity, config.read_run(asked(tmp_path)), tmp_path / "runs", "../x")
    with pytest.raises(BitallocError, match="cannot read"):
        config.read_run(tmp_path / "absent.yaml")
    assert plots.command("d", ["--run-dir", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_examples_are_runs() -> None:
    examples = sorted((ROOT / "config/runs").glob("*.yaml"))
    assert examples and all(config.read_run(path) for path in examples)
    assert json.dumps(config.Run.model_json_schema())
