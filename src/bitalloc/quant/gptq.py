"""GPTQ (Frantar et al. 2023), which is LDLQ (Chee et al. 2023): round column by column, feeding errors forward.

Rows are independent given the moments, so whole matrices and options are stacked and share one loop over the
columns. The loop looks left: the feedback of everything before a span of some 512 columns comes as one large
product when the span is reached, what the span itself adds when a group is, and only within a group does it
go column by column.

Shapes: I inputs, R rows of all stacked matrices, a columns so far, g columns of a group, s of a span.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitalloc.quant.block import add_product, columns
from bitalloc.quant.factor import Group, Order
from bitalloc.quant.grid import Grid, Stack

SPAN = 512


def gptq(X_IR: Tensor, stack: Stack, order: Order) -> Grid:
    """Quantise stacked matrices (inputs first, in `order`); X is overwritten with the residual."""
    M_II = order.M_II
    grid = Grid.empty(X_IR, order)
    spans = _spans(order)
    F_sR = X_IR.new_empty(max(span[-1].stop - span[0].start for span in spans), X_IR.shape[1])
    for span in spans:
        first, last = span[0].start, span[-1].stop
        # where a group should move to make up for the errors before it is D P; its scales must see that
        P_as = M_II.new_empty(last, last - first)
        for group in span:
            a, b = group.start, group.stop
            P_as[:a, a - first : b - first] = torch.linalg.solve_triangular(
                M_II[a:b, a:b], M_II[:a, a:b], upper=True, left=False
            )
        f_sR = F_sR[: last - first].zero_()
        if first:
            add_product(f_sR, P_as[:first].T, X_IR[:first], stack.rows)
        for group in span:
            a, b = group.start, group.stop
            f_gR = f_sR[a - first : b - first]
            if a > first:
                add_product(f_gR, P_as[first:a, a - first : b - first].T, X_IR[first:a], stack.rows)
            columns(f_gR, order, stack, grid, group)
    return grid


def _spans(order: Order) -> list[list[Group]]:
    """Groups in runs of at most `SPAN` columns, at least one each."""
    found: list[list[Group]] = []
    for group in order.groups:
        if found and group.stop - found[-1][0].start <= SPAN:
            found[-1].append(group)
        else:
            found.append([group])
    return found
