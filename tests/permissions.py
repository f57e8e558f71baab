"""Permissions that hold, even where root runs the tests."""

import os
import shutil

import pytest


def bound(*command: str) -> list[str]:
    """A command that permissions bind; skips the test where they cannot be made to."""
    if os.getuid():
        return list(command)
    if shutil.which("setpriv") is None:
        pytest.skip("permissions do not bind root, and there is no setpriv")
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *command]
