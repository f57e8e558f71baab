"""Where a result comes from: a digest of the code that made it, and a record of the machine it ran on."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bitalloc.store import Store, file_digest


@functools.cache
def source_digest(*modules: str) -> str:
    """Digest of the given `bitalloc` modules and of everything of `bitalloc` that they import.

    Imported modules are neither a rerun trigger of Snakemake nor part of its cache key, so rules pass
    this as a parameter: `code=source_digest("bitalloc.sweep")`. Read statically: nothing is imported.
    """
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
    """Digest and imports of a module of `bitalloc`; None for any other name.

    Cached because parsing for every rule anew took a quarter of the start of each snakemake command.
    """
    path = _source(module)
    if path is None:
        return None
    source = path.read_bytes()
    return hashlib.sha256(source).digest(), _imports(module, source)


def _source(module: str) -> Path | None:
    if module != "bitalloc" and not module.startswith("bitalloc."):
        return None
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def _imports(module: str, source: bytes) -> list[str]:
    found: list[str] = []
    tree = ast.parse(source)
    # what is imported for type checkers alone does not run
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    todo: list[ast.AST] = [tree]
    while todo:  # statements alone: `ast.walk` would visit every expression, for a third of a second at every start
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, module)
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, name, ())
    return [name for name in found if name.startswith("bitalloc")]


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
