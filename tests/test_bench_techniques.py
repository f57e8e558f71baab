"""benchmarks/bench_techniques.py: rotations that change nothing, choices that are the best, honest rows."""

import importlib
from pathlib import Path

import pytest
import torch

from bitalloc.config import Config
from bitalloc.errors import BitallocError
from bitalloc.models import load_model
from tests.random_models import save
from tests.small import CPU, tokens

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BPW = 6.0  # groups of 16 have many scales


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("bench_techniques")


@pytest.fixture(scope="module")
def study(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("techniques")
    sweep = {"bits": [2, 4, 8], "group_sizes": [16], "ranks": [0]}
    settings = Config.model_validate({"device": "cpu", "sweep": sweep})
    return bench.Study(save("llama", folder / "model"), settings, "llama", tokens(), folder / "small-00")


def test_folded_model_computes_the_same_and_others_are_refused(bench, study, tmp_path):
    techniques = importlib.import_module("techniques")
    techniques.fold(study.path, tmp_path / "folded")
    ids_NT = torch.arange(24)[None]
    before, after = (load_model(path, device=CPU)(ids_NT).logits for path in (study.path, tmp_path / "folded"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(BitallocError, match="only a Llama without biases is folded here, not gpt2"):
        techniques.fold(save("gpt2", tmp_path / "gpt2"), tmp_path / "none")


def test_plan_fits_and_what_is_rotated_is_rotated_back(bench, study):
    made = bench.rotated(study, BPW)
    weights = sum(row["rows"] * row["columns"] for row in made.layers.values())
    assert made.plan["nbytes"].sum() <= BPW * weights / 8 and set(made.plan["layer"]) == set(study.layers)
    for layer, What_OI in made.swept().items():
        W_OI = study.checkpoint.weight(layer)
        error = (What_OI - W_OI).norm() / W_OI.norm()
        assert error < 4 / 2 ** made.options[layer].bits
        assert (made.matrices[layer].dequantize() - W_OI).norm() > W_OI.norm()  # it is of another basis


def test_least_error_is_taken_matrix_by_matrix(bench, study):
    coarse, fine = bench.setting(study, 4.0), bench.setting(study, BPW)
    one, two = study.layers[:2]
    tried = [{one: coarse.matrices[one], two: fine.matrices[two]}, {one: fine.matrices[one], two: coarse.matrices[two]}]
    assert all(coarse.options[layer].bits < fine.options[layer].bits for layer in (one, two))
    plan = fine.plan[fine.plan["layer"].isin((one, two))]
    assert importlib.import_module("techniques").least(plan, tried, study.experiments()) == {one: 1, two: 0}


def test_sequential_moments_are_the_models_own_until_something_is_quantised(bench, study):
    default, behind = bench.setting(study, BPW), bench.sequential(study, BPW)
    block = default.plan.set_index("layer")["block"]
    same = {
        layer: torch.equal(default.matrices[layer].codes_OI, behind.matrices[layer].codes_OI) for layer in block.index
    }
    assert all(same[layer] for layer in block.index[block == 0])
    assert not all(same[layer] for layer in block.index[block > 0])


def test_search_that_may_not_clip_covers_every_weight(bench, study):
    made = bench.clipped(study, BPW, most=[1.0])
    whole = bench.setting(study, BPW)
    for layer, matrix in made.matrices.items():
        assert (matrix.scale_OG.float() >= whole.matrices[layer].scale_OG.float() * 0.9).float().mean() > 0.9
    assert any((matrix.scale_OG != whole.matrices[layer].scale_OG).any() for layer, matrix in made.matrices.items())


def test_rows_stand_against_the_default_with_codes_of_their_kind(bench, study, monkeypatch, capsys):
    assert bench.setting(study, BPW).learned(iterations=1, polish=0).keys() == set(study.layers)
    learned = bench.setting(study, BPW, damping=1.0).swept()
    monkeypatch.setattr(bench.Made, "learned", lambda self, **_: learned)
    names = ["no error feedback", "no polish", "rotated at run time"]
    found = list(bench.measure(study, BPW, names, learn=True))
    told = {(row["technique"], row["codes"]): row for row in found}
    both = [(name, codes) for name in ("default", names[0]) for codes in ("swept", "learned")]
    assert list(told) == [*both, (names[1], "learned"), (names[2], "swept")]
    same = [("default", "swept"), (names[0], "learned"), (names[1], "learned")]
    assert all(told[place]["times"] == 1 for place in same)
    for name, codes, against in (("default", "learned", "swept"), (names[0], "swept", "swept")):
        row = told[name, codes]
        assert row["times"] == pytest.approx(row["kl"] / told["default", against]["kl"])
        assert row["times_lo"] < row["times"] < row["times_hi"] and row["times"] != 1
    assert len({row["nbytes"] for row in found}) == 1
    assert not list(bench.measure(study, BPW, [], learn=False))[1:]
