"""What the project itself computes with: the unquantised model, the dequantised plan, the plan as it is packed."""

from __future__ import annotations

from functools import partial

from bitalloc import models
from bitalloc.backends.backend import Runnable, Subject
from bitalloc.formats import bitalloc


def reference(subject: Subject) -> Runnable:
    """The unquantised model."""
    return Runnable(partial(models.load_model, subject.source, device=subject.device, remote_code=subject.remote_code))


def dequantised(subject: Subject) -> Runnable:
    """Every matrix of the plan as Q + L R in dense form: what sweep and evaluation score."""
    return Runnable(partial(bitalloc.load_model, subject.reader.folder, device=subject.device))


def native(subject: Subject) -> Runnable:
    """The native checkpoint, its matrices packed in memory."""
    import bitalloc.formats.packed  # noqa: F401 - teaches transformers the format

    nbytes = sum(record["nbytes"] for record in subject.reader.manifest["files"].values())
    return Runnable(partial(models.load_model, subject.reader.folder, device=subject.device), lambda: nbytes)
