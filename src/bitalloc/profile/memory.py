"""Peaks of memory.

Memory on a CPU is the high-water mark of the resident set (VmHWM, Linux) of processes that do nothing else, one for
each batch and length, set back between loading, reading and writing; on a GPU what torch allocated and reserved.
"""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import torch

MB = 1e6


def high_water() -> float | None:
    """Most MB that this process has had in memory since `set_back`; None where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 / MB if found and _settable() else None


def set_back(device: str) -> None:
    """Give back what is free, and let the marks begin anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    _settable()


def _settable() -> bool:
    """Set VmHWM to what is resident now (proc_pid_clear_refs(5)); False where that is not to be had.

    Without it the marks of three phases cannot be told apart.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peaks(phase: str, device: str) -> dict[str, float | None]:
    """Peaks in MB since `set_back`; what the device does not have is None."""
    if device == "cuda":
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated() / MB, torch.cuda.max_memory_reserved() / MB
        return {f"{phase}_mem_mb": allocated, f"{phase}_reserved_mb": reserved}
    return {f"{phase}_mem_mb": high_water(), f"{phase}_reserved_mb": None}
