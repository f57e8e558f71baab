import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitalloc.lowrank import Target, _orthonormal, compress, decompose, leading, stacks
from bitalloc.option import Option
from bitalloc.quant import Factor
from tests.quant.reference import lowrank, moments, rel_error, weights


def decaying(rows: int, columns: int, *, power: float, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, min(rows, columns), generator=draw))[0] for n in (rows, columns))
    return U * torch.arange(1, min(rows, columns) + 1) ** -power @ V.T


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_leading_is_the_eckart_young_optimum(rows, columns, rank, seed):
    Y = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    A, B = leading(Y, rank)
    assert A.shape == (rows, min(rank, rows, columns))
    tail = float(torch.linalg.svdvals(Y.double())[rank:].square().sum())
    assert float((Y - A @ B).square().sum()) == pytest.approx(tail, rel=1e-4, abs=1e-8)


def test_ranks_are_nested_strongest_first():
    Y = decaying(40, 60, power=0.7)
    A, B = leading(Y, 8)
    a, b = leading(Y, 3)
    assert torch.allclose(A[:, :3] @ B[:3], a @ b, atol=1e-5)


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_the_randomised_svd_is_within_one_percent(power):
    Y = decaying(1100, 1060, power=power)
    A, B = leading(Y, 32)
    tail = float((torch.arange(33, 1061, dtype=torch.float64) ** (-2 * power)).sum())
    assert tail <= float((Y - A @ B).square().sum()) * (1 + 1e-4) <= 1.01 * tail
    again = leading(Y, 32)
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])


def test_a_deficient_sketch_stays_orthonormal_where_it_has_rank():
    Y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 12)
    Q = _orthonormal(Y, passes=2)
    assert bool(Q.isfinite().all())
    assert torch.allclose(Q @ (Q.T @ Y), Y, atol=1e-3)


def plain(W: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank] @ V[:rank]


def test_whitening_reaches_the_optimum_in_the_calibrated_norm_and_beats_the_plain_svd():
    W, H = weights(48, 80), moments(80, outliers=3)
    factor = Factor(H, 0.1)
    order = factor.order(16, True)
    A, B = leading(order.M_II.T @ W.T[order.permutation_I], 6)
    whitened = (order.stored(order.unwhiten(A.T).T) @ B).T
    damped = H.double() + factor.lam * torch.eye(80)
    best = torch.linalg.svdvals(W.double() @ torch.linalg.cholesky(damped))[6:].square().sum()

    def error(What: torch.Tensor) -> float:
        E = W.double() - What.double()
        return float(((E @ damped) * E).sum())

    assert error(whitened) == pytest.approx(float(best), rel=1e-4)
    assert error(whitened) < error(plain(W, 6)) / 1.1


@pytest.mark.parametrize("factor_bits", [8, 16])
def test_factors_are_stored_to_the_precision_of_their_bits(factor_bits):
    """8 bits for the codes leave nothing to fit, so the low-rank part stays what the SVD of W made it."""
    W, H = decaying(64, 96, power=0.8), moments(96)
    option = Option("rtn", 8, 32, 5, factor_bits)
    [fitted] = decompose(W, Factor(H, 0.1), [option], act_order=True, iterations=0)
    damped = H.double() + 0.1 * H.diagonal().double().mean() * torch.eye(96)
    expected = lowrank(W.double(), torch.linalg.cholesky(damped), 5)
    off = (fitted.matrix.lowrank_part() - expected).norm() / expected.norm()
    assert off < (1e-4 if factor_bits == 8 else 2e-2)
    assert fitted.matrix.L_OR.dtype == (torch.int8 if factor_bits == 8 else torch.float16)


def test_rank_helps_and_rounds_never_hurt():
    W, H = weights(64, 96, outliers=10), moments(96, outliers=2)
    options = [Option("gptq", 2, 32, rank) for rank in (0, 2, 8)]
    by_rounds = [decompose(W, Factor(H, 0.1), options, act_order=True, iterations=n) for n in (0, 1, 3)]
    for fitted in by_rounds:
        assert fitted[0].error > fitted[1].error > fitted[2].error
    for none, one, three in zip(*by_rounds, strict=True):
        assert three.objective <= one.objective <= none.objective
    assert by_rounds[0][0].objective == by_rounds[2][0].objective


def test_a_rank_beyond_the_matrix_is_stored_whole_and_harmless():
    W, H = weights(6, 40), moments(40)
    option = Option("gptq", 2, 32, 16)
    [fitted] = decompose(W, Factor(H, 0.1), [option], act_order=True, iterations=1)
    assert fitted.matrix.nbytes == option.nbytes(6, 40)
    assert rel_error(W, fitted.matrix.dequantize(), H) < 1e-3


def test_a_matrix_of_zeros_is_stored_exactly():
    options = [Option("gptq", 2, 32, rank) for rank in (0, 4)]
    for fitted in decompose(torch.zeros(8, 40), Factor(moments(40), 0.1), options, act_order=True, iterations=1):
        assert fitted.square == 0 and not fitted.matrix.dequantize().any()


def test_results_come_in_the_order_of_the_options():
    options = [Option("gptq", 3, 32, 0), Option("rtn", 2, 64, 2), Option("none", 16, 0, 0), Option("gptq", 2, 32, 2)]
    W, factor = weights(4, 64), Factor(moments(64), 0.1)
    fitted = decompose(W, factor, options, act_order=True, iterations=1)
    assert [f.matrix.option for f in fitted] == options
    items = [(Target(W, factor, act_order=True), option) for option in options]
    assert [[items.index(item) for item in stack] for stack in stacks(items)] == [[0, 3], [1], [2]]


def test_matrices_of_a_site_share_a_stack_and_do_not_feel_it():
    factor = Factor(moments(96, outliers=2), 0.1)
    options = [Option("gptq", bits, 32, rank) for bits in (2, 4) for rank in (0, 3)]
    targets = [Target(weights(rows, 96, seed=rows), factor, act_order=True) for rows in (48, 16, 130)]
    stack = [(target, option) for target in targets for option in options]
    assert len(stacks(stack)) == 1
    for (target, option), ours in zip(stack, compress(stack, iterations=2), strict=True):
        [alone] = decompose(target.W_OI, factor, [option], act_order=True, iterations=2)
        assert (ours.error, ours.square, ours.energy) == (alone.error, alone.square, alone.energy)
        assert torch.equal(ours.matrix.dequantize(), alone.matrix.dequantize())


def test_errors_alone_are_the_same_errors():
    factor = Factor(moments(64), 0.1)
    stack = [(Target(weights(20, 64), factor, act_order=True), Option("gptq", 3, 32, 2))]
    [whole], [errors] = (compress(stack, iterations=1, matrices=matrices) for matrices in (True, False))
    assert errors.matrix is None
    assert (errors.error, errors.square, errors.energy) == (whole.error, whole.square, whole.energy)


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_a_guess_saves_rounds_and_not_accuracy(power):
    Y = decaying(1100, 1060, power=power)
    near = Y + 0.3 * Y.std() * torch.randn(Y.shape, generator=torch.Generator().manual_seed(1))
    _, guess = leading(near, 32)
    A, B = leading(Y, 32, guess=guess)
    tail = float((torch.arange(33, 1061, dtype=torch.float64) ** (-2 * power)).sum())
    assert float((Y - A @ B).square().sum()) <= 1.01 * tail


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("given", ["1024 1024 1 2,3,4 0,64", "256 2048 2 2,4 0,32", "1024 1024 1 3 512"])
def test_a_stack_takes_the_memory_that_is_told(given):
    """The sweep fills its workspace by it. A process of its own: what was freed before is not seen to be taken."""
    command = [sys.executable, "-m", "tests.memory", *given.split()]
    root = Path(__file__).parents[1]
    # what is freed goes back at once: what the heap of the C library keeps of it differs from run to run
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, env=environment)
    share = float(done.stdout)
    assert 0.5 < share < 1.1
