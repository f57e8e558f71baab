"""benchmarks/bench_peers.py: bytes as they are stored, one evaluation, a peer that works, one that fails."""

import argparse
import doctest
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitalloc.formats import bitalloc as checkpoints
from tests.small import OPTIONS, small, tokens

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# rounds to nearest at 4 bits a row, and refuses a budget below that
WORKER = """
import sys
sys.path.insert(0, {peers!r})
from safetensors.torch import load_file, save_file
from whole import work

def quantise(job):
    if job.bpw < 4:
        raise ValueError("4 bits are the least")
    weights, parts = {{}}, {{}}
    for name, W in load_file(job.model + "/model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer in job.layers:
            scale = W.float().abs().amax(1, keepdim=True) / 7
            codes = (W.float() / scale).round()
            weights[layer] = codes * scale
            parts[layer + ".codes"] = codes.char()[:, ::2].contiguous()  # two in a byte
            parts[layer + ".scales"] = scale.half()
    job.keep(weights)
    job.checkpoint.mkdir()
    save_file(parts, job.checkpoint / "model.safetensors")
    return f"{{job.ids().numel()}} tokens", None

work("torch", quantise)
"""


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("bench_peers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small("llama", tmp_path_factory.mktemp("peers"))


@pytest.fixture
def comparison(bench, made, tmp_path, monkeypatch):
    """A model, its windows, and a peer of the name `nearest`; bitalloc itself has not run."""
    worker = tmp_path / "model_nearest.py"
    worker.write_text(WORKER.format(peers=str(BENCHMARKS / "peers")))
    monkeypatch.setitem(bench.PEERS, "nearest", ("nearest", str(worker)))
    monkeypatch.setattr(bench, "RIVALS", ["nearest"])
    claimed = made.inventory[made.inventory["claimed"]]
    layers = {row.layer: [row.rows, row.columns] for row in claimed.itertuples()}
    subject = bench.Subject("small", made.path, {"settings": {"device": "cpu"}}, {})
    project = SimpleNamespace(subject=subject, seed=0, tokens=tokens, layers=lambda: layers, reach=lambda: (0, 10**9))
    given = {"threads": 1, "limit": 5.0, "pythons": {"nearest": Path(sys.executable)}, "environments": tmp_path}
    return bench.Comparison(project, tmp_path, argparse.Namespace(**given))


@pytest.mark.parametrize("module", ["peers.whole", "comparison"])
def test_doctests(bench, module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed


def test_bytes_are_counted_as_they_are_stored(bench, tmp_path):
    whole = importlib.import_module("peers.whole")
    parts = {"a.qweight": torch.zeros(8, 128, dtype=torch.int32), "a.scales": torch.zeros(4, 128).half()}
    parts |= {"a.g_idx": torch.zeros(128, dtype=torch.int32), "a.bias": torch.zeros(128), "head.weight": torch.zeros(9)}
    save_file(parts, tmp_path / "one.safetensors")
    save_file({"b.weight": torch.zeros(6, 7)}, tmp_path / "two.safetensors")
    found = whole.stored(tmp_path, {"a": [128, 128], "b": [6, 7]})
    assert whole.nbytes(found) == 8 * 128 * 4 + 4 * 128 * 2 + 6 * 7 * 2
    with pytest.raises(ValueError, match="nothing is stored of c"):
        whole.nbytes(whole.stored(tmp_path, {"c": [1, 1]}))


def test_peer_is_driven_counted_scored_and_not_run_twice(bench, comparison, capsys):
    comparison.reference()
    comparison.peer("nearest", "5bpw")
    reference, row = comparison.rows
    assert (reference["kl"], reference["top1"], reference["bytes"]) == (pytest.approx(0, abs=1e-6), 1, None)
    rows = sum(sides[0] for sides in comparison.layers.values())
    assert row["bytes"] == comparison.weights // 2 + 2 * rows
    assert (
        row["missed_by"] == pytest.approx(row["bytes"] / (5 * comparison.weights / 8) - 1, abs=1e-3)
        and row["why"] is None
    )
    assert row["kl_lo"] < row["kl"] < row["kl_hi"] and row["seconds"] > 0 and row["peak_mem_mb"] > 0
    assert row["setting"] == f"{2 * 12 * 24} tokens" and row["corpora"].keys() == {"noise"}

    # the same by hand: plain forward passes of the model with those weights
    model, weights = comparison.evaluation.model, load_file(comparison.work / "nearest-5bpw/weights.safetensors")
    assert all(torch.equal(model.get_submodule(layer).weight, W_OI) for layer, W_OI in weights.items())
    frame = tokens()
    ids_NT = bench.ids(frame[frame["split"] == "report"]).long()
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(ids_NT[:, :-1]).logits.flatten(0, 1), ids_NT[:, 1:].flatten())
    assert row["nll"] == pytest.approx(float(nll), rel=1e-5)

    log = comparison.work / "nearest-5bpw/log.txt"
    log.unlink()
    comparison.peer("nearest", "5bpw")
    assert comparison.rows[2] == row and not log.exists()


def test_peer_that_fails_says_why(comparison, capsys):
    comparison.peer("nearest", "3bpw")  # raises nothing: the rest goes on
    (failed,) = comparison.rows
    assert failed["why"] == "ValueError: 4 bits are the least" and failed["kl"] is None and failed["bytes"] is None
    assert capsys.readouterr().out == "nearest at 3: ValueError: 4 bits are the least\n"
    assert comparison.strongest("3bpw") is None


def test_figure_shows_what_there_is(bench, tmp_path):
    row = {"kl": 0.1, "kl_lo": 0.05, "kl_hi": 0.2, "bpw": 2.5, "budget": 2.5, "seconds": 9.0}
    rows = [{**row, "tool": tool} for tool in ("bitalloc best", "hqq")]
    rows += [{**row, "tool": "reference", "budget": None}, {**row, "tool": "modelopt", "kl": None}]
    for some, name in ((rows, "peers"), (rows[:1], "ours")):  # no peer could run
        bench.draw(some, "small", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    bench.draw(rows[2:], "small", tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_job_beyond_its_limit_is_killed_in_one_line(bench, tmp_path):
    running = importlib.import_module("running")
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
    with pytest.raises(running.FailedError, match=r"^not done after 0 s; give it more with --limit$"):
        running.timed(command, log=tmp_path / "log.txt", environ=running.threaded(1, ours=True), limit_s=0)


def test_job_that_is_killed_says_by_what(bench, tmp_path):
    running = importlib.import_module("running")
    script = "import os, signal; print('3 of 4', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(running.FailedError, match=r"^ended by SIGKILL$"):
        running.timed(
            [sys.executable, "-c", script], log=tmp_path / "log.txt", environ=running.threaded(1, ours=True), limit_s=60
        )


def test_only_rivals_near_the_budget_count(bench, comparison):
    place = {"tool": "nearest", "budget": 2.5}
    far, near, worse = ({**place, "kl": kl, "missed_by": by} for kl, by in ((0.1, 3.9), (0.3, 0.04), (0.4, -0.1)))
    comparison.rows = [far, worse, near, {**place, "tool": bench.MAP, "kl": 0.01, "missed_by": 0.0}]
    assert comparison.strongest("2.5bpw") is near


def test_ours_gets_the_bytes_of_a_peer_just_below_the_budget(comparison):
    allowed = comparison.allowed("4bpw")
    row = {"tool": "nearest", "budget": 4.0, "kl": 0.1, "missed_by": 0.0}
    asked = {}
    for size in (allowed - 8, allowed, allowed // 2):
        comparison.rows = [{**row, "bytes": size}]
        asked[size] = comparison.asked("4bpw")
    assert asked[allowed] == asked[allowed // 2] == "4bpw"  # far below is another budget: `pairs` asks for it too
    assert allowed - 9 <= comparison.allowed(asked[allowed - 8]) <= allowed - 8


def test_calibrations_go_into_one_interval(bench, tmp_path):
    place = {"model": "small", "budget": 2.5, "tool": "bitalloc best", "peer": "nearest"}
    file = tmp_path / "peers.json"
    for seed, ratio in enumerate((0.4, 0.6)):
        pair = {**place, "seed": seed, "ratio": ratio, "ppl_ratio": 1.01}
        bench.save(file, [{"model": "small", "seed": seed, "tool": "nearest"}], [pair])
    found = bench.save(file, [{"model": "small", "seed": 0, "tool": "nearest", "kl": 1.0}], [])
    assert [row.get("kl") for row in found["rows"]] == [None, 1.0] and len(found["pairs"]) == 2
    (over,) = found["calibrations"]
    assert over["ratio"] == pytest.approx(0.24**0.5) and over["n"] == 2 and over["lo"] < 0.4 and over["hi"] > 0.6
    assert over["ppl_ratio"] == pytest.approx(1.01) and over["ppl_hi"] == pytest.approx(1.01)


def test_model_is_known_by_its_files(bench, made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    one, same = (bench.Subject(path.name, path, {}, {}).content for path in (made.path, copy))
    (copy / "config.json").write_text("{}")
    assert one == same != bench.Subject("copy", copy, {}, {}).content


def test_our_checkpoint_is_read_as_it_is_stored(bench, made, tmp_path):
    project = object.__new__(bench.Project)
    project.results = tmp_path / "results"
    plan = made.plan(OPTIONS)
    checkpoints.save(
        project.results / "models/best-2.5bpw", source=made.experiments.checkpoint, inventory=made.inventory, plan=plan,
        matrix=made.experiments.matrix, sweep=made.experiments.sweep, extra={},
    )  # fmt: skip
    pd.DataFrame({"plan": ["best-2.5bpw"], "note": ["won"]}).to_parquet(project.results / "plans.parquet")
    claimed = made.inventory[made.inventory["claimed"]]
    project.layers = lambda: {layer: [1, 1] for layer in claimed["layer"]}
    told = project.export("best", "2.5bpw", tmp_path)
    assert bench.nbytes(told["stored"]) == plan["nbytes"].sum() and told["setting"] == "won"
    row = plan.iloc[0]
    option = OPTIONS[0]
    What_OI = made.experiments.matrix(row["layer"], option).dequantize()
    torch.testing.assert_close(load_file(tmp_path / "weights.safetensors")[row["layer"]], What_OI)


def test_folder_of_any_name_describes_itself(bench, made, tmp_path, monkeypatch):
    monkeypatch.delenv("BITALLOC_DATA", raising=False)
    found = bench.subject(str(made.path))
    raw = json.loads((made.path / "config.json").read_text())
    assert (found.row["family"], found.row["blocks"]) == ("llama", raw["num_hidden_layers"])
    assert found.row["settings"]["retrieve"]["report"] == ["docstrings"]
    text = tmp_path / "some.txt"
    assert bench.subject(str(made.path), text).corpora == {"text": {"sources": [str(text)], "separator": ""}}
    with pytest.raises(SystemExit, match=r"^nowhere is neither a model of config/models.yaml nor a folder$"):
        bench.subject("nowhere")
