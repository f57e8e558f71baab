"""What every registered quantiser promises, whatever its algorithm."""

from functools import cache
from itertools import pairwise

import pytest
import torch

from bitalloc.errors import BitallocError
from bitalloc.lowrank import Decomposition, decompose
from bitalloc.option import Option
from bitalloc.quant import QUANTIZERS, CompressedMatrix, Factor, quantizer
from tests.quant.reference import moments, rel_error, weights

SHAPES = [(24, 128), (1, 64), (17, 172), (40, 30)]
KINDS = {"gaussian": 0, "outliers": 15}


@cache
def matrix(rows: int, columns: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    return weights(rows, columns, outliers=min(KINDS[kind], rows * columns)), moments(columns, outliers=2)


def fit(W: torch.Tensor, H: torch.Tensor, options: list[Option], **settings) -> list[Decomposition]:
    return decompose(W, Factor(H, 0.1), options, **{"act_order": True, "iterations": 1} | settings)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTIZERS)
class TestContract:
    def test_shape_bytes_and_error_are_what_is_stored(self, name, shape, kind, symmetric):
        W, H = matrix(*shape, kind)
        options = [Option(name, b, 64, r, f, symmetric) for b in (2, 3, 8) for r, f in ((0, 8), (3, 8), (3, 16))]
        for option, fitted in zip(options, fit(W, H, options), strict=True):
            stored = fitted.matrix.tensors()
            packed = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
            assert packed == fitted.matrix.nbytes == option.nbytes(*shape)
            again = CompressedMatrix.from_tensors(option, *shape, {n: t.clone() for n, t in stored.items()})
            What = again.dequantize()
            assert torch.equal(What, fitted.matrix.dequantize())
            assert What.shape == W.shape and What.dtype == torch.float32 and bool(What.isfinite().all())
            assert torch.equal(again.quantised_part() + again.lowrank_part(), What)
            assert fitted.square == pytest.approx(float((W - What).square().sum()), rel=2e-3)
            assert fitted.energy == pytest.approx(float(What.square().sum()), rel=1e-4)
            reached = fitted.error / float(((W @ H) * W).sum())
            assert reached == pytest.approx(rel_error(W, What, H), rel=2e-3, abs=1e-9)
            assert bool((fitted.matrix.scale_OG > 0).all())

    def test_more_bits_never_cost_less_nor_err_more(self, name, shape, kind, symmetric):
        W, H = matrix(*shape, kind)
        options = [Option(name, bits, 64, rank, 8, symmetric) for rank in (0, 2) for bits in (2, 3, 4, 5, 6, 8)]
        fitted = fit(W, H, options)
        for fewer, more in [*pairwise(fitted[: len(fitted) // 2]), *pairwise(fitted[len(fitted) // 2 :])]:
            assert more.objective < fewer.objective
            assert more.matrix.nbytes > fewer.matrix.nbytes

    def test_an_option_does_not_feel_its_stack(self, name, shape, kind, symmetric):
        W, H = matrix(*shape, kind)
        options = [Option(name, b, g, r, 8, symmetric) for g in (32, 64) for b in (2, 4) for r in (0, 1, 3)]
        together = fit(W, H, options)
        for option, fitted in list(zip(options, together, strict=True))[::3]:
            [alone] = fit(W, H, [option])
            if shape[0] == 1:  # a product with a vector is rounded as its strides have it
                assert alone.error == pytest.approx(fitted.error, rel=1e-5)
                continue
            assert (alone.error, alone.square) == (fitted.error, fitted.square)
            stored = fitted.matrix.tensors()
            assert all(torch.equal(tensor, stored[part]) for part, tensor in alone.matrix.tensors().items())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rows_are_independent(name):
    W, H = matrix(24, 128, "outliers")
    option = Option(name, 3, 64, 0)
    [whole], [part] = fit(W, H, [option]), fit(W[5:9], H, [option])
    assert torch.allclose(whole.matrix.dequantize()[5:9], part.matrix.dequantize(), atol=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_stay_in_range_and_extreme_weights_stay_finite(name):
    W = torch.zeros(6, 70)
    W[1], W[2, ::2], W[3, 3], W[4] = 1e-9, 1e4, -1e6, torch.linspace(-1, 2, 70)
    for bits in (2, 3, 8):
        [fitted] = fit(W, moments(70), [Option(name, bits, 32, 0)])
        assert int(fitted.matrix.codes_OI.max()) < 2**bits
        assert bool(fitted.matrix.dequantize().isfinite().all())
        assert not fitted.matrix.dequantize()[0].any()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_dead_inputs_do_not_make_nan(name):
    W, H = weights(8, 64), moments(64)
    H[:7], H[:, :7] = 0, 0
    [fitted] = fit(W, H, [Option(name, 2, 32, 2)])
    assert bool(fitted.matrix.dequantize().isfinite().all())


def test_the_pass_through_is_exact_for_16_bit_weights():
    option = Option("none", 16, 0, 0)
    for half in (torch.float16, torch.bfloat16):
        W = weights(5, 12).to(half).float()
        [fitted] = fit(W, moments(12), [option], half=half)
        assert fitted.error == fitted.square == 0.0
        stored = fitted.matrix.tensors()
        assert stored["weight"].dtype == half and fitted.matrix.nbytes == option.nbytes(5, 12)
        assert torch.equal(CompressedMatrix.from_tensors(option, 5, 12, stored).dequantize(), W)


def test_tensors_of_another_option_are_refused():
    [fitted] = fit(weights(4, 64), moments(64), [Option("rtn", 2, 64, 0)])
    with pytest.raises(BitallocError, match="gptq-3b-g64-r0"):
        CompressedMatrix.from_tensors(Option("gptq", 3, 64, 0), 4, 64, fitted.matrix.tensors())


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(BitallocError, match=r"'gptqq'.*'gptq'"):
        quantizer("gptqq")
