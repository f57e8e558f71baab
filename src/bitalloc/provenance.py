"""Where a result comes from: a digest of the code that made it, and a record of the machine it ran on."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bitalloc.store import Store, file_digest

# read by pattern, held to the syntax tree by a test: 130 trees took half a second of every start of snakemake
_IMPORT = re.compile(r"^ *(?:from (bitalloc[\w.]*) import (\([^)]*\)|.*)|import (bitalloc[\w.]*))", re.MULTILINE)
_NAME = re.compile(r"(\w+)(?: as \w+)?")
_COMMENT = re.compile(r" *#.*")
_FOR_TYPES = re.compile(r"^if TYPE_CHECKING:\n(?:(?: .*)?\n)*", re.MULTILINE)


@functools.cache
def source_digest(*modules: str) -> str:
    """Digest of the given `bitalloc` modules and of everything of `bitalloc` that they import.

    Imported modules are neither a rerun trigger of Snakemake nor part of its cache key, so rules pass
    this as a parameter: `code=source_digest("bitalloc.sweep")`. Read statically: nothing is imported.
    """
    for name in modules:
        if _read(name) is None:  # one that was moved would silently count for nothing
            raise ModuleNotFoundError(f"no module {name} to take the digest of")
    seen: dict[str, bytes] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in seen and (found := _read(name)) is not None:
            seen[name], imports = found
            todo += imports
    whole = hashlib.sha256()
    for name in sorted(seen):
        whole.update(name.encode() + b"\0" + seen[name])
    return whole.hexdigest()[:16]


@functools.cache
def _read(module: str) -> tuple[bytes, list[str]] | None:
    """Digest and imports of a module of `bitalloc`; None for any other name."""
    path = _source(module)
    if path is None:
        return None
    source = path.read_bytes()
    return hashlib.sha256(source).digest(), _imports(source.decode())


def _source(module: str) -> Path | None:
    if module != "bitalloc" and not module.startswith("bitalloc."):
        return None
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def _imports(source: str) -> list[str]:
    """Modules of `bitalloc` that `source` imports, wherever; what is imported for type checkers alone does not run."""
    found = []
    for base, names, whole in _IMPORT.findall(_FOR_TYPES.sub("", _COMMENT.sub("", source))):
        found += [whole or base, *(f"{base}.{name}" for name in _NAME.findall(names))]
    return found


def identity(wildcards: Mapping[str, str], inputs: Mapping[str, Path], store: Store) -> dict[str, Any]:
    """What determines the output of a cached rule and is not in Snakemake's key: a parameter puts it there.

    These are the wildcards, the content of inputs that other rules make (weights, in the end), and the store
    that a table points into. An input that is still to be made raises FileNotFoundError, as Snakemake expects.
    """
    contents = {name: file_digest(path) for name, path in inputs.items()}
    return {"wildcards": dict(wildcards), "inputs": contents, "store": store.identity()}


def run_record(*packages: str) -> dict[str, str]:
    """Machine, Python, commit and the versions of `packages`: for logs, never for tables that must repeat."""
    record = {"python": platform.python_version(), "machine": platform.machine(), "commit": commit()}
    for package in packages:
        try:
            record[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            record[package] = "absent"
    return record


def commit() -> str:
    """The checked-out commit, with `+` when files differ from it; `unknown` outside a repository."""
    try:
        run = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return head + ("+" if run(["git", "status", "--porcelain"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
