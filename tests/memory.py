"""Peak memory of `compress` in this process, for test_lowrank: python -m tests.memory O I TARGETS BITS RANKS."""

import re
import sys
import threading
from pathlib import Path

import torch

from bitalloc.lowrank import Target, compress, working_bytes
from bitalloc.option import Option
from bitalloc.quant import Factor


def resident() -> int:
    """Bytes of this process that are in memory and no copy of a file (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def grown(O: int, I: int, targets: int, options: list[Option]) -> int:  # noqa: E741
    """Bytes by which the process grows at most while it compresses."""
    draw = torch.Generator().manual_seed(0)
    X_TI = torch.randn(I // 2, I, generator=draw)
    factor = Factor(X_TI.T @ X_TI / len(X_TI), 0.1)
    factor.order(128, True)
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    held = [Target(torch.randn(O, I, generator=draw), factor, act_order=True) for _ in range(targets)]
    compress([(target, option) for target in held for option in options], iterations=1)
    done.set()
    watcher.join()
    return peak - before


def main() -> None:
    O, I, targets = map(int, sys.argv[1:4])  # noqa: E741
    bits, ranks = (list(map(int, given.split(","))) for given in sys.argv[4:])
    options = [Option("gptq", b, 128, r) for b in bits for r in ranks]
    grown(256, 256, 1, options)  # libraries, threads and pools
    told = working_bytes([(k, O, I, option) for k in range(targets) for option in options], iterations=1)
    print(grown(O, I, targets, options) / told)


if __name__ == "__main__":
    main()
