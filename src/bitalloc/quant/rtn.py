"""Round to nearest: every weight by itself, the scales chosen for the inputs that matter.

Shapes: I inputs, R rows of all stacked matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitalloc.quant.block import add_product, columns
from bitalloc.quant.factor import Order
from bitalloc.quant.grid import Grid, Stack


def rtn(X_IR: Tensor, stack: Stack, order: Order) -> Grid:
    """Quantise stacked matrices (inputs first, in `order`); X is overwritten with the residual."""
    grid = Grid.empty(X_IR, order)
    for group in order.groups:
        columns(torch.zeros_like(X_IR[group.start : group.stop]), order, stack, grid, group, feed=False)
    grid.E_IR.zero_()
    add_product(grid.E_IR, order.M_II.T, X_IR, stack.rows)
    for part in stack.rows:
        grid.error_R[part] = grid.E_IR[:, part].square().sum(0, dtype=torch.float64)
    return grid
