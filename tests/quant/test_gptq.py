"""GPTQ against the papers' formulas, written out in reference.py."""

import pytest
import torch
from safetensors.torch import load_file

from bitalloc.lowrank import decompose
from bitalloc.option import Option
from bitalloc.quant import Factor
from tests.quant.reference import compress, moments, rel_error, weights

TINY = "resources/tiny/model.safetensors"


@pytest.mark.parametrize(
    ("group_size", "symmetric", "act_order"),
    [
        (32, False, True),
        (64, False, True),
        (64, False, False),
        (64, True, True),
        (128, True, False),
        (200, False, True),
    ],
)
def test_equals_the_reference_one_option_at_a_time(group_size, symmetric, act_order):
    W, H = weights(96, 172, outliers=20), moments(172, outliers=2)
    options = [Option("gptq", bits, group_size, rank, 8, symmetric) for bits in (2, 3, 4) for rank in (0, 4)]
    fitted = decompose(W, Factor(H, 0.1), options, act_order=act_order, iterations=1)
    for option, ours in zip(options, fitted, strict=True):
        expected = compress(W, H, option, damping=0.1, act_order=act_order, iterations=1)
        reached = rel_error(W, ours.matrix.dequantize(), H)
        assert reached == pytest.approx(rel_error(W, expected, H), rel=1e-2 if option.rank else 1e-3), option.name


def test_equals_the_reference_on_trained_weights():
    W = load_file(TINY)["model.layers.2.mlp.down_proj.weight"].float()
    H = moments(384, outliers=4)
    for option in (Option("gptq", 2, 64, 0), Option("gptq", 3, 64, 8)):
        [ours] = decompose(W, Factor(H, 0.1), [option], act_order=True, iterations=1)
        expected = compress(W, H, option, damping=0.1, act_order=True, iterations=1)
        reached = rel_error(W, ours.matrix.dequantize(), H)
        assert reached == pytest.approx(rel_error(W, expected, H), rel=1e-2 if option.rank else 1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_to_nearest_on_correlated_inputs(bits):
    W, H = weights(64, 128), moments(128, outliers=2)
    rtn, gptq = decompose(
        W, Factor(H, 0.1), [Option(name, bits, 64, 0) for name in ("rtn", "gptq")], act_order=True, iterations=0
    )
    assert gptq.error < 0.8 * rtn.error


def test_is_rounding_to_nearest_when_inputs_are_independent():
    W = weights(16, 64)
    rtn, gptq = decompose(
        W,
        Factor(torch.eye(64), 0.1),
        [Option(name, 3, 32, 0) for name in ("rtn", "gptq")],
        act_order=True,
        iterations=0,
    )
    assert torch.equal(rtn.matrix.dequantize(), gptq.matrix.dequantize())


def test_scales_see_the_feedback():
    """Two equal inputs: what group 0 lost, group 1 must be able to make up for, beyond the range of its weights."""
    W = torch.tensor([[1.0, 1.0, 0.4, 0.0]])
    H = torch.eye(4) + 0.999 * torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0.0]])
    [fitted] = decompose(W, Factor(H, 1e-3), [Option("gptq", 2, 2, 0)], act_order=False, iterations=0)
    expected = compress(W, H, Option("gptq", 2, 2, 0), damping=1e-3, act_order=False, iterations=0)
    assert torch.allclose(fitted.matrix.dequantize().double(), expected, atol=1e-4)
