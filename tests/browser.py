"""Chromium without a window, told what to do over its debugging pipe (DevTools protocol): no driver is needed."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# the browser reads commands from descriptor 3 and writes to 4
WIRED = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
SILENT = [
    "--headless=new",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
]
# natural widths of all figures, decoded (0: broken), which of them can be seen, and what sticks out sideways
LOOK = """
Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => ({
    widths: [...document.images].map(image => image.naturalWidth),
    visible: [...document.images].map(image => image.checkVisibility() && image.getBoundingClientRect().height > 10),
    overflow: document.documentElement.scrollWidth - window.innerWidth,
}))
"""


def complaints(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the browser wrote to its console, errors of scripts and refusals of the policy included."""
    words = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    return [event for event in events if event.get("method") in words]


def requests(events: list[dict[str, Any]]) -> set[str]:
    """Addresses that the page asked for, itself included, what it holds inside left out."""
    asked = [event for event in events if event.get("method") == "Network.requestWillBeSent"]
    return {url for event in asked if not (url := event["params"]["request"]["url"]).startswith("data:")}


class Browser:
    def __init__(self, write: int, read: int) -> None:
        self.write, self.read, self.rest, self.count = write, read, b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.count += 1
        command = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.write, json.dumps(command).encode() + b"\0")
        return self.wait(lambda message: message.get("id") == self.count)["result"]

    def wait(self, wanted) -> dict[str, Any]:
        """The first message that is wanted; the events before it are kept."""
        end = time.monotonic() + 60
        while True:
            while b"\0" in self.rest:
                line, _, self.rest = self.rest.partition(b"\0")
                message = json.loads(line)
                if wanted(message):
                    return message
                self.events.append(message)
            if not select.select([self.read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self.read, 1 << 16)
            if not data:
                raise RuntimeError("the browser has gone")
            self.rest += data


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in `folder`; the test is skipped where there is none."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    (there, write), (read, back) = os.pipe(), os.pipe()
    options = [*SILENT, f"--user-data-dir={folder}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    process = subprocess.Popen(
        [sys.executable, "-c", WIRED, str(there), str(back), binary, *options],
        pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(there), os.close(back)
    browser = Browser(write, read)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        os.close(write), os.close(read)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def opened(path: Path, folder: Path, *, width: int = 1280) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """The page at `path` once it is loaded: (evaluate an expression in it, what happened meanwhile)."""
    with started(folder) as browser:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            browser.call(f"{domain}.enable", session)
        browser.call(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        browser.call("Page.navigate", session, url=path.resolve().as_uri())
        browser.wait(lambda message: message.get("method") == "Page.loadEventFired")

        def evaluate(expression: str) -> Any:
            asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
            return browser.call("Runtime.evaluate", session, **asked)["result"].get("value")

        yield evaluate, browser.events
