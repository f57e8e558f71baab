"""benchmarks/bench_matrices.py: a common error, a worker that keeps to the protocol, a peer that cannot be had."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitalloc.lowrank import Factor, decompose
from bitalloc.option import Option

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def matrices(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_matrices")


def test_problem_is_seeded_and_its_outliers_stand_out(matrices):
    one, again = matrices.problem(8, 64), matrices.problem(8, 64)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    plain = matrices.problem(8, 64, gain=1)
    louder_I = (one.X_TI.square().mean(0) / plain.X_TI.square().mean(0)).round()
    assert torch.equal(one.W_OI, plain.W_OI) and louder_I.sort().values.tolist() == [1] * 63 + [900]
    torch.testing.assert_close(one.H_II, one.X_TI.T @ one.X_TI / 128)


def test_worker_returns_what_the_library_makes_and_what_it_took(matrices, tmp_path):
    given = matrices.problem(96, 256)
    matrices.save_file(given._asdict(), tmp_path / "problem.safetensors")
    run = matrices.Run("bitalloc", "groups", symmetric=True)
    row, What_OI = matrices.measure(run, Path(sys.executable), tmp_path / "problem.safetensors", 1)
    option = Option("gptq", 4, 128, 0, symmetric=True)
    (expected,) = decompose(given.W_OI, Factor(given.H_II, 0.1), [option], act_order=True, iterations=1)
    energy = Factor(given.H_II, 0.1).energy(given.W_OI)
    assert matrices.relative_error(given.W_OI, What_OI, given.H_II) == pytest.approx(expected.error / energy, rel=1e-3)
    assert row["seconds"] > 0 and row["wall_s"] > 0 and row["peak_mem_mb"] >= row["before_mem_mb"] > 0


def test_peer_without_environment_is_left_out_in_one_line(matrices, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: again\nERROR: no route\n[notice] a newer pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(matrices.FailedError, match=r"^no environment \(ERROR: no route\); run again with a network$"):
        matrices.environment(tmp_path, "hqq")
    assert not (tmp_path / "hqq/ready.txt").exists()


def test_run_that_fails_is_left_out_unless_it_is_ours(matrices, tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: too large\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert matrices.measure(matrices.Run("hqq", "none"), Path("python"), tmp_path / "problem", 1) is None
    assert capsys.readouterr().out == "hqq: a run failed (MemoryError: too large)\n"
    with pytest.raises(SystemExit, match="bitalloc: a run failed"):
        matrices.measure(matrices.Run("bitalloc", "groups"), Path("python"), tmp_path / "problem", 1)


@pytest.mark.parametrize("peer", ["autoround", "gptqmodel", "hqq", "llmcompressor", "modelopt"])
def test_requirements_are_exact_and_name_no_index(peer):
    lines = (BENCHMARKS / f"peers/{peer}.txt").read_text().splitlines()[1:]
    assert "torch==2.13.0" in lines and all(line.count("==") == 1 and " " not in line for line in lines)
