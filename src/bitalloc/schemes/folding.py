"""The residual stream, rotated in the weights.

Shapes: D width of the stream, I inputs of a matrix W_OI.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitalloc.errors import BitallocError
from bitalloc.quant.hadamard import Rotation
from bitalloc.schemes.matrices import Scope, device_of


@torch.no_grad()
def fold(model: nn.Module, found: Scope, seed: int) -> None:
    """Rotate the residual stream of a Mamba2 by R, in its weights alone: its logits stay what they are.

    Exact, because all that lies between writers and readers of the stream are additions and RMS norms, and a norm
    without weights commutes with R; the norms' weights go into the matrices that read them first. The input of out_proj
    is no such place: gate and norm make it, not a matrix, so its rotation has to be done at run time (`online`).
    """
    if found.family.name != "mamba2":
        raise BitallocError(f"folded: the residual stream of {found.family.name} is not folded yet; take `online`")
    body, head = model.backbone, model.lm_head
    rotation = Rotation(model.config.hidden_size, seed=seed, device=device_of(model))
    if head.weight is body.embeddings.weight:  # the head takes the last norm's weights, the embedding does not
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False

    def reads(W_OI: Tensor, norm: nn.Module) -> None:
        W_OI.copy_(rotation(W_OI.float() * norm.weight.float()))
        norm.weight.fill_(1.0)

    def writes(tensor: Tensor | None) -> None:
        if tensor is not None:  # [D, I], or a bias [D]
            tensor.copy_(rotation(tensor.float().T).T)

    body.embeddings.weight.copy_(rotation(body.embeddings.weight.float()))
    for block in body.layers:
        reads(block.mixer.in_proj.weight, block.norm)
        writes(block.mixer.out_proj.weight)
        writes(block.mixer.out_proj.bias)
    reads(head.weight, body.norm_f)
