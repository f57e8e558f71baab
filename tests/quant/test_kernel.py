"""The compiled kernels against plain torch, which is against the papers in test_gptq.py."""

import importlib

import pytest
import torch

from bitalloc.quant import Factor, Stack, block, kernel, quantizer
from tests.quant.reference import moments, weights


@pytest.fixture(scope="module")
def fused():
    """The kernel for GPUs under the interpreter of Triton: its arithmetic, not its speed."""
    pytest.importorskip("triton")
    return importlib.import_module("bitalloc.quant.fused").columns


def run(monkeypatch, work, name, *, columns, group_size, symmetric, rows=(48, 5, 130), bits=(2, 3, 8)):
    order = Factor(moments(columns, outliers=2), 0.1).order(group_size, True)
    monkeypatch.setattr(block, "_compiled", lambda _: work)
    X_IR = torch.cat([weights(n, columns, seed=n, outliers=3) for n in rows]).T[order.permutation_I].contiguous()
    stack = Stack.of(rows, bits, symmetric=symmetric, device=X_IR.device)
    return X_IR.clone(), quantizer(name)(X_IR, stack, order), stack, order


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(100, 40), (30, 64), (5, 1)])  # a group takes it .3 s
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_the_kernel_for_gpus_agrees_with_plain_torch(monkeypatch, fused, name, columns, group_size, symmetric):  # noqa: PLR0917
    settings = {"columns": columns, "group_size": group_size, "symmetric": symmetric}
    _, ours, stack, _ = run(monkeypatch, fused, name, **settings)
    _, plain, _, _ = run(monkeypatch, block.plain, name, **settings)
    assert (ours.codes_IR == plain.codes_IR).float().mean() > 0.97
    assert torch.equal(ours.zero_GR, plain.zero_GR)
    for part in stack.rows:
        assert ours.error(part) == pytest.approx(plain.error(part), rel=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(172, 64), (600, 128), (30, 64), (130, 1)])
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_agrees_with_plain_torch(monkeypatch, name, columns, group_size, symmetric):
    settings = {"columns": columns, "group_size": group_size, "symmetric": symmetric}
    X_IR, ours, stack, order = run(monkeypatch, kernel.columns, name, **settings)
    _, plain, _, _ = run(monkeypatch, block.plain, name, **settings)
    # a tie that falls the other way changes what follows in its row, so it is most codes that agree
    assert (ours.codes_IR == plain.codes_IR).float().mean() > 0.97
    for part in stack.rows:
        assert ours.error_R[part].sum() == pytest.approx(float(plain.error_R[part].sum()), rel=1e-3)
        squares = [float(grid.D_IR[:, part].square().sum()) for grid in (ours, plain)]
        assert squares[0] == pytest.approx(squares[1], rel=1e-3)
    # what it returns is what it says: codes, scales and zeros give the residual, and that the errors
    index = torch.tensor([g.place for g in order.groups for _ in range(g.start, g.stop)])
    What_IR = (ours.codes_IR.float() - ours.zero_GR[index].float()) * ours.scale_GR[index].float()
    assert torch.allclose(X_IR - What_IR, ours.D_IR, atol=1e-6)
    assert torch.allclose(order.whiten(ours.D_IR), ours.E_IR, atol=1e-5 * float(ours.E_IR.abs().max()) + 1e-6)
    assert torch.allclose(ours.E_IR.double().square().sum(0), ours.error_R, rtol=1e-4)


def test_scales_are_float16_of_every_size():
    """Large, ordinary, subnormal and vanishing ranges: the compiled rounding to 16 bits is torch's."""
    size_R = torch.logspace(-9, 4, 500)
    x_gR = torch.rand(8, 500, generator=torch.Generator().manual_seed(0)).mul_(size_R)
    order = Factor(torch.eye(8), 0.1).order(8, False)
    stack = Stack.of([500], [4], symmetric=False, device=x_gR.device)
    ours, plain = (block.Grid.empty(x_gR.clone(), order) for _ in range(2))
    kernel.columns(torch.zeros_like(x_gR), order, stack, ours, order.groups[0])
    block.plain(torch.zeros_like(x_gR), order, stack, plain, order.groups[0])
    assert (ours.scale_GR == plain.scale_GR).float().mean() > 0.99
    assert torch.allclose(ours.scale_GR.float(), plain.scale_GR.float(), rtol=0.06, atol=2.0**-24)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(monkeypatch, threads):
    before = torch.get_num_threads()
    settings = {"columns": 172, "group_size": 64, "symmetric": False, "rows": (700,), "bits": (3,)}
    _, one, _, _ = run(monkeypatch, kernel.columns, "rtn", **settings)
    try:
        torch.set_num_threads(threads)
        _, many, _, _ = run(monkeypatch, kernel.columns, "rtn", **settings)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.codes_IR, many.codes_IR) and torch.equal(one.D_IR, many.D_IR)


def test_without_numba_plain_torch_does_the_work_and_says_so(monkeypatch, capsys):

    def refuse(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(block, "import_module", refuse)
    block._compiled.cache_clear()
    try:
        assert block._compiled("kernel") is block.plain
    finally:
        block._compiled.cache_clear()
    assert "no compiled kernel (No module named 'numba')" in capsys.readouterr().err
