"""The export `huggingface`: `transformers` with `compressed-tensors` unpacks it, `peft` adds the low-rank part."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitalloc.backends.backend import Runnable, Subject, library
from bitalloc.formats import huggingface as form
from bitalloc.models import load_model

REMEDY = "pip install 'bitalloc[huggingface]'"


def huggingface(subject: Subject) -> Runnable:
    """The plan as it is, rank included; raises `BitallocError` for what the format or this machine cannot carry."""
    form.refuse(subject.reader)
    for name in ("compressed_tensors", "peft"):
        library(name, REMEDY)
    folder = subject.scratch / "huggingface"

    def write() -> int:
        form.save(folder, subject.reader)
        return form.measure(folder)

    return Runnable(partial(_load, folder, subject.device), write)


def _load(folder: Path, device: torch.device) -> Any:
    model = load_model(folder, device=device)
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long, device=device))  # unpacks, which the adapter waits for
    if (folder / form.ADAPTER).is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, (folder / form.ADAPTER).parent).get_base_model()
    return model.eval()
