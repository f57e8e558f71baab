"""The export `gguf`: scored as `transformers` reads it back, timed in llama.cpp where its binding is installed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from bitalloc.backends.backend import Runnable, Subject
from bitalloc.formats import gguf as form
from bitalloc.models import load_model
from bitalloc.suites import Windows


def gguf(subject: Subject) -> Runnable:
    """Codes as they are where a type holds them, else quantised again; raises `BitallocError` as the format does."""
    form.refuse(subject.reader)
    path = subject.scratch / "model.gguf"

    def write() -> int:
        form.save(path, subject.reader)
        return form.measure(path)

    load = partial(load_model, path.parent, device=subject.device, gguf_file=path.name)
    return Runnable(load, write, partial(_speed, path))


def _speed(path: Path, windows: Windows) -> float | None:
    """Tokens a second of llama.cpp over all windows, one at a time."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    llama = Llama(str(path), n_ctx=windows.longest, n_threads=torch.get_num_threads(), verbose=False)
    start, count = time.perf_counter(), 0
    for tokens in windows.frame["tokens"]:
        llama.reset()
        llama.eval([int(token) for token in tokens])
        count += len(tokens)
    return count / (time.perf_counter() - start)
