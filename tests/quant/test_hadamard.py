from __future__ import annotations

import pytest
import torch

from bitalloc.quant.hadamard import Rotation, hadamard, orders

WIDTHS = [
    32,
    48,
    64,
    256,
    768,
    1536,
    2560,
    11008,
]  # 768 and 1536 of mamba2-130m, 2560 of 2.7b; 11008 has no H of its own


@pytest.mark.parametrize("dim", WIDTHS)
def test_rotation_is_orthogonal(dim: int) -> None:
    rotation, x_TI = Rotation(dim, seed=3), torch.randn(5, dim)
    turned_TI = rotation(x_TI)
    assert torch.allclose(turned_TI.norm(dim=1), x_TI.norm(dim=1), rtol=1e-5)
    assert torch.allclose(turned_TI @ turned_TI.T, x_TI @ x_TI.T, atol=1e-2 if dim > 4096 else 1e-3)
    assert torch.allclose(rotation.inverse(turned_TI), x_TI, atol=1e-5)
    assert not torch.allclose(turned_TI, Rotation(dim, seed=4)(x_TI))


@pytest.mark.parametrize("order", [2, 16, 12, 20, 44, 152])
def test_hadamard_has_orthogonal_rows_of_signs(order: int) -> None:
    H = hadamard(order)
    assert torch.equal(H @ H.T, order * torch.eye(order))
    assert set(H.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("dim", WIDTHS)
def test_one_outlier_is_spread_over_its_block(dim: int) -> None:
    x_I = torch.zeros(dim)
    x_I[7] = 1.0
    block = torch.tensor(orders(dim)).prod().item()
    assert Rotation(dim)(x_I).abs().amax().item() == pytest.approx(block**-0.5, rel=1e-4)


def test_product_and_moments_are_kept() -> None:
    rotation, W_OI, X_TI = Rotation(48), torch.randn(7, 48), torch.randn(9, 48)
    assert torch.allclose(rotation(X_TI) @ rotation(W_OI).T, X_TI @ W_OI.T, atol=1e-5)
    assert torch.allclose(rotation.moments(X_TI.T @ X_TI), rotation(X_TI).T @ rotation(X_TI), atol=1e-4)
