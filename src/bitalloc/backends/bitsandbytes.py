"""bitsandbytes int8: rounds the original weights itself, in memory, one scale a row; rounds activations to 8 bits too.

It is not saved from here: what its 4-bit types save after a forward reloads wrong without a word.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bitalloc.backends.backend import EXTRA, Runnable, Subject, coded, library, linear
from bitalloc.errors import BitallocError
from bitalloc.models import load_model


def bitsandbytes(subject: Subject) -> Runnable:
    """Plans of symmetric 8 bits, one group a row, and 16 bits."""
    for layer, option, columns in coded(subject.reader):
        if option.bits != 8 or option.rank or option.group_size < columns or not option.symmetric:
            codes = f"{option.name}{'' if option.symmetric else ' with zero points'}"
            raise BitallocError(
                f"bitsandbytes: {layer} has {codes}, not 8 symmetric bits with one scale a row; native carries it"
            )
    return bitsandbytes_int8(subject)


def bitsandbytes_int8(subject: Subject) -> Runnable:
    """int8 for every matrix that the plan gives codes, whatever the plan says."""
    linear(subject.reader, "bitsandbytes")
    library("bitsandbytes", EXTRA)
    return Runnable(partial(_load, subject))


def _load(subject: Subject) -> Any:
    from bitsandbytes.nn import Linear8bitLt

    model = load_model(subject.source, device=subject.device, remote_code=subject.remote_code)
    for layer, *_ in coded(subject.reader):
        given = model.get_submodule(layer)
        made = Linear8bitLt(given.in_features, given.out_features, given.bias is not None, has_fp16_weights=False)
        made.load_state_dict(given.state_dict())
        model.set_submodule(layer, made.to(subject.device))  # which rounds
    return model.eval()
