"""From YAML to a section: whatever is wrong becomes one line, with the key and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from bitalloc.config.section import Section
from bitalloc.errors import BitallocError, nearest

S = TypeVar("S", bound=Section)


def validate(section: type[S], raw: Any, where: str) -> S:
    """`raw` as a `section`; raises `BitallocError` with its first three faults."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise BitallocError("; ".join(_explain(fault, where, section) for fault in error.errors()[:3])) from None


def read(section: type[S], path: Path, what: str = "") -> S:
    """The YAML file at `path` as a `section`; `what` it is goes into the line that says why it cannot be read."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise BitallocError(f"cannot read {what}{path}: {' '.join(str(error).split())[:200]}") from None
    return validate(section, raw, str(path))


def _explain(fault: Any, where: str, section: type[Section]) -> str:
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key {'.'.join(path)!r}: {nearest(path[-1], _keys(path[:-1], section))}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {'.'.join(path)}: {message} (got {str(fault['input'])[:60]!r})"


def _keys(path: list[str], section: Any) -> list[str]:
    """Valid keys of the section at `path` below `section`; names of models, corpora .. lead to what they name."""
    for part in path:
        if field := getattr(section, "model_fields", {}).get(part):
            section = get_args(field.annotation)[1] if get_origin(field.annotation) is dict else field.annotation
    return list(section.model_fields)
