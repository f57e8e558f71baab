"""The one exception that users see: a single line that says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitallocError(Exception):
    """Bad input or a broken precondition. The message is one line and names the remedy."""


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """A hint for a mistyped name: the nearest valid one, or all of them.

    >>> nearest("gptqq", ["rtn", "gptq"])
    "did you mean 'gptq'?"
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(wrong, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
