"""A Linear whose weights and input are rounded.

Shapes: O outputs, I inputs of a matrix W_OI, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bitalloc.errors import BitallocError
from bitalloc.quant.activation import Activation
from bitalloc.quant.hadamard import Rotation


class QuantLinear(nn.Module):
    """y = What q(R x) + b: a Linear whose weights and input are rounded; `rotation` and `activation` may be None.

    With `kept_O` the marked outputs come from the original weights and input instead: what layerwise sensitivity needs.
    """

    def __init__(
        self, linear: nn.Linear, What_OI: Tensor, activation: Activation | None, rotation: Rotation | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation, self.rotation, self.bias = activation, rotation, linear.bias
        self.register_buffer("What_OI", What_OI.to(linear.weight))
        self.original_OI: Tensor | None = None
        self.kept_O: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """What_OI. Fused kernels take it when training and pass by this module's forward, hence the refusal."""
        if self.training:
            raise BitallocError(
                "a quantised Linear was read in training mode, where a kernel may pass it by: model.eval()"
            )
        return self.What_OI

    def forward(self, x_TI: Tensor) -> Tensor:
        read_TI = x_TI if self.rotation is None else self.rotation(x_TI)
        if self.activation is not None:
            read_TI = self.activation(read_TI)
        y_TO = F.linear(read_TI, self.weight, self.bias)
        if self.kept_O is None:
            return y_TO
        return torch.where(self.kept_O, F.linear(x_TI, self.original_OI, self.bias), y_TO)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.activation}, rotated={self.rotation is not None}"


@contextmanager
def calls(model: nn.Module, layers: list[str]) -> Iterator[Counter[str]]:
    """Counts how often the forward of each of these modules is called meanwhile: 0 for one that is passed by."""
    counts: Counter[str] = Counter(dict.fromkeys(layers, 0))
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: counts.update([layer]))
        for layer in layers
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
