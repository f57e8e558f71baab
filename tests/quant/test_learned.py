"""A learned matrix is what it stores, takes gradients through it, and never leaves its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitalloc.lowrank import Factor, decompose
from bitalloc.option import Option
from bitalloc.quant import CompressedMatrix
from bitalloc.quant.learned import PARTS, Learned

OPTIONS = [
    Option("gptq", 2, 16, 0),
    Option("gptq", 3, 16, 2),
    Option("rtn", 4, 32, 0, symmetric=True),
    Option("gptq", 2, 16, 3, factor_bits=16),
]
EVERY = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.name}-{option.factor_bits}")


def given(option: Option) -> tuple[CompressedMatrix, torch.Tensor]:
    """A matrix whose last group is not full."""
    draw = torch.Generator().manual_seed(0)
    W_OI, X_TI = torch.randn(12, 40, generator=draw), torch.randn(200, 40, generator=draw)
    (found,) = decompose(W_OI, Factor(X_TI.T @ X_TI / 200, 0.1), [option], act_order=True, iterations=1)
    assert found.matrix is not None
    return found.matrix, W_OI


def jolt(learned: Learned, size: float = 2.0) -> None:
    draw = torch.Generator().manual_seed(1)
    for part in PARTS:
        for parameter in learned.parameters[part]:
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=size)
    learned.confine()


@EVERY
def test_starts_as_the_matrix_it_is_given(option: Option) -> None:
    matrix, W_OI = given(option)
    start = Learned(matrix, W_OI).compressed()
    for name, tensor in matrix.tensors().items():
        assert torch.equal(start.tensors()[name], tensor), name


@EVERY
@pytest.mark.parametrize("size", [0.1, 2.0, 1e6])
def test_computes_with_what_it_stores(option: Option, size: float) -> None:
    matrix, W_OI = given(option)
    learned = Learned(matrix, W_OI)
    jolt(learned, size)
    stored = learned.compressed()
    assert torch.equal(learned.weight(), stored.dequantize())
    assert stored.nbytes == matrix.nbytes == option.nbytes(12, 40)
    again = CompressedMatrix.from_tensors(option, 12, 40, stored.tensors())
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert stored.dequantize().isfinite().all()


@EVERY
def test_gradients_are_those_of_the_formula_and_reach_codes_at_the_border(option: Option) -> None:
    matrix, W_OI = given(option)
    learned = Learned(matrix, W_OI)
    jolt(learned, 1e6)  # every code lies at a border
    parameters = [p.requires_grad_() for part in PARTS for p in learned.parameters[part]]
    G_OI = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    (learned.weight() * G_OI).sum().backward()
    stored = learned.compressed()
    scale_OI, zero_OI = (
        (matrix_OG.float() if matrix_OG is not None else torch.full((12, 1), 8.0)).repeat_interleave(
            option.group_size if matrix_OG is not None else 40, 1
        )[:, :40]
        for matrix_OG in (stored.scale_OG, stored.zero_OG)
    )
    torch.testing.assert_close(learned.parameters["rounding"][0].grad, G_OI * scale_OI)
    whole = G_OI * (stored.codes_OI.float() - zero_OI) * scale_OI / (scale_OI / _spread(learned.scale_OG, option))
    per_group = torch.stack([part.sum(1) for part in whole.split(option.group_size, 1)], 1)
    torch.testing.assert_close(learned.parameters["scales"][0].grad, per_group, rtol=1e-4, atol=1e-4)
    if option.rank:
        L_OR, R_RI = stored.factors()
        torch.testing.assert_close(learned.parameters["factors"][0].grad, G_OI @ R_RI.T * learned.unit_L_R)
        torch.testing.assert_close(learned.parameters["factors"][1].grad, L_OR.T @ G_OI * learned.unit_R_R[:, None])
    assert len(parameters) == 2 + (matrix.zero_OG is not None) + 2 * bool(option.rank)


def _spread(x_OG: torch.Tensor, option: Option) -> torch.Tensor:
    return x_OG.repeat_interleave(option.group_size, 1)[:, :40]


def test_nearest_forgets_the_codes() -> None:
    matrix, W_OI = given(OPTIONS[0])
    other = replace(matrix, codes_OI=3 - matrix.codes_OI)
    nearest = Learned(other, W_OI, nearest=True).compressed()
    assert torch.equal(nearest.codes_OI, Learned(matrix, W_OI, nearest=True).compressed().codes_OI)
    error = (nearest.dequantize() - W_OI).abs()
    assert error.sum() < (matrix.dequantize() - W_OI).abs().sum()  # GPTQ gives up nearness for the output
