"""The export `gptq`, for GPTQModel: `transformers` itself does not load mixed bits, nor any bits without it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitalloc.backends.backend import Runnable, Subject, library
from bitalloc.formats import gptq as form
from bitalloc.models import working_dtype

REMEDY = "it asks for an environment of its own (docs/formats.md)"


def gptq(subject: Subject) -> Runnable:
    """The codes as they are; raises `BitallocError` for rank, and where GPTQModel cannot be imported."""
    form.refuse(subject.reader)
    library("gptqmodel", REMEDY)
    folder = subject.scratch / "gptq"

    def write() -> int:
        form.save(folder, subject.reader)
        return form.measure(folder)

    return Runnable(partial(_load, folder, subject.device), write)


def _load(folder: Path, device: torch.device) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    kernel = {"backend": BACKEND.GPTQ_TORCH} if device.type == "cpu" else {}  # others compile for half a minute
    # only half precision loads; the kernel then computes in the type of what it is given
    loaded = GPTQModel.load(str(folder), device=str(device), dtype=torch.float16, **kernel)
    return loaded.model.to(working_dtype(device)).eval()
