import pytest
import torch

from bitalloc.errors import BitallocError
from bitalloc.quant import Factor
from tests.quant.reference import grouped, moments


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [16, 64, 200])
def test_factor_is_upper_triangular_and_reproduces_the_damped_moments(group_size, act_order):
    H = moments(100, outliers=3)
    factor = Factor(H, 0.1)
    order = factor.order(group_size, act_order)
    p, M = order.permutation_I, order.M_II.double()
    damped = H.double() + factor.lam * torch.eye(100)
    assert torch.equal(M, M.triu())
    assert torch.allclose(M @ M.T, damped[p][:, p], rtol=1e-5, atol=1e-6 * float(damped.max()))
    assert factor.lam == pytest.approx(0.1 * float(H.diagonal().mean()))
    assert p.tolist() == [column for group in grouped(H, group_size, act_order) for column in group]


def test_groups_stay_whole_and_go_by_falling_energy():
    H = moments(100, outliers=3)
    order = Factor(H, 0.1).order(32, True)
    sizes = {group.index: group.stop - group.start for group in order.groups}
    assert sizes == {0: 32, 1: 32, 2: 32, 3: 4}
    energies = []
    for group in order.groups:
        columns = order.permutation_I[group.start : group.stop]
        assert set((columns // 32).tolist()) == {group.index}
        diagonal = H.diagonal()[columns]
        assert bool((diagonal.diff() <= 0).all())
        energies.append(float(diagonal.sum()))
    assert energies == sorted(energies, reverse=True)


def test_stored_undoes_the_order():
    order = Factor(moments(40), 0.1).order(16, True)
    X = torch.arange(40)
    assert torch.equal(order.stored(X[order.permutation_I]), X)
    places = torch.tensor([group.index for group in order.groups])
    assert order.stored_groups(places).tolist() == [0, 1, 2]


def test_energy_is_undamped():
    H, D = moments(20), torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    assert Factor(H, 0.5).energy(D) == pytest.approx(float(torch.trace(D @ H @ D.T)), rel=1e-5)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda H: H.fill_(float("nan")), "NaN"),
        (lambda H: H.index_fill_(0, torch.tensor([3]), float("inf")), "NaN or Inf"),
        (lambda H: H.zero_(), "zero"),
        (lambda H: H.fill_diagonal_(0.0).add_(torch.eye(8) * 1e-3), "positive definite.*damping"),
    ],
)
def test_moments_that_cannot_be_used_are_refused(broken, words):
    H = broken(torch.ones(8, 8))
    with pytest.raises(BitallocError, match=words) as raised:
        Factor(H, 0.01, name="7.mlp_in").order(4, True)
    assert "7.mlp_in" in str(raised.value)


def test_a_dead_input_is_no_trouble():
    H = moments(16)
    H[5], H[:, 5] = 0, 0
    assert bool(Factor(H, 0.01).order(8, True).M_II.isfinite().all())


def test_moments_that_can_be_read_again_are_let_go_and_change_nothing():
    H, D = moments(40), torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    reads = []

    def reread() -> torch.Tensor:
        reads.append(1)
        return H.clone()

    held, lean = Factor(H, 0.1), Factor(H.clone(), 0.1, reread=reread)
    for group_size, so_far in ((16, 0), (16, 0), (8, 1)):
        assert torch.equal(held.order(group_size, True).M_II, lean.order(group_size, True).M_II)
        assert len(reads) == so_far
    assert held.energy(D) == lean.energy(D)
    assert len(reads) == 2
