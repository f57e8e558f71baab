"""torchao: rounds the original weights itself, in memory, to the plan's bits and groups or to int8.

Codes of fewer than 8 bits take a byte each there. Parameters are named in full: a module's name would reach its bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bitalloc.backends.backend import EXTRA, Runnable, Subject, coded, library, linear
from bitalloc.errors import BitallocError
from bitalloc.models import load_model


def torchao(subject: Subject) -> Runnable:
    """To the nearest code, with the plan's bits and group sizes; matrices of 16 bits stay as they are."""
    linear(subject.reader, "torchao")
    for layer, option, columns in coded(subject.reader):
        if option.rank:
            raise BitallocError(f"torchao: {layer} has rank {option.rank}, which has no place there; native carries it")
        if columns % option.group_size:
            raise BitallocError(
                f"torchao: {layer} has {columns} inputs, no multiple of the group size {option.group_size}; "
                "native carries it"
            )
    library("torchao", EXTRA)
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    mapping = MappingType.SYMMETRIC if subject.reader.options.symmetric else MappingType.ASYMMETRIC
    configs = {
        f"{layer}.weight": IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{option.bits}"),
            granularity=PerGroup(option.group_size),
            mapping_type=mapping,
        )
        for layer, option, _ in coded(subject.reader)
    }
    return Runnable(partial(_load, subject, configs))


def torchao_int8(subject: Subject) -> Runnable:
    """8 bits with one scale a row for every matrix that the plan gives codes, whatever the plan says."""
    linear(subject.reader, "torchao")
    library("torchao", EXTRA)
    from torchao.quantization import Int8WeightOnlyConfig

    config = Int8WeightOnlyConfig(version=2)
    return Runnable(partial(_load, subject, {f"{layer}.weight": config for layer, *_ in coded(subject.reader)}))


def _load(subject: Subject, configs: Mapping[str, Any]) -> Any:
    from torchao.quantization import FqnToConfig, quantize_

    model = load_model(subject.source, device=subject.device, remote_code=subject.remote_code)
    quantize_(model, FqnToConfig(dict(configs)), filter_fn=None)
    return model
