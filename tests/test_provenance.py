"""The digest of code moves with what a module imports, and only with that."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bitalloc
from bitalloc import provenance
from bitalloc.store import Store, digest


def digest_in(folder: Path, *modules: str) -> str:
    code = f"from bitalloc.provenance import source_digest; print(source_digest(*{modules!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.parametrize("file", ["families.py", "config/chain.py", "tables/chain.py"])
def test_a_change_deep_below_a_module_changes_its_digest(tmp_path, file):
    shutil.copytree(Path(bitalloc.__file__).parent, tmp_path / "bitalloc", ignore=shutil.ignore_patterns("__pycache__"))
    # sweep imports families; option imports the configuration, hence families, for type checkers only
    before = {name: digest_in(tmp_path, name) for name in ("bitalloc.sweep", "bitalloc.option")}
    with (tmp_path / "bitalloc" / file).open("a") as below:
        below.write("\n# changed\n")
    after = {name: digest_in(tmp_path, name) for name in before}
    assert after["bitalloc.sweep"] != before["bitalloc.sweep"]
    assert after["bitalloc.option"] == before["bitalloc.option"]


def test_no_import_of_the_syntax_tree_is_missed():
    """One in a docstring counts as well, which does no harm."""
    folder = Path(bitalloc.__file__).parent
    for path in folder.rglob("*.py"):
        source, listed = path.read_text(), set()
        tree = ast.parse(source)
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                listed |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import would not be seen"
                listed |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        assert {name for name in listed if name.startswith("bitalloc")} <= set(provenance._imports(source)), path


def test_absent_packages_are_said_to_be_absent():
    assert provenance.run_record("no-such-package")["no-such-package"] == "absent"


def test_the_identity_of_a_cached_table_follows_all_that_it_depends_on(tmp_path):
    wildcards, inputs, store = {"model": "tiny", "unit": "block-000"}, {"inventory": tmp_path / "i"}, Store(tmp_path)
    inputs["inventory"].write_text("weights")
    first = provenance.identity(wildcards, inputs, store)
    assert provenance.identity(wildcards, inputs, store) == json.loads(json.dumps(first)) == first
    found = [first, provenance.identity(wildcards | {"model": "renamed"}, inputs, store)]
    found.append(provenance.identity(wildcards | {"unit": "block-001"}, inputs, store))
    found.append(provenance.identity(wildcards, inputs, Store(tmp_path / "other")))
    inputs["inventory"].write_text("other weights")
    found.append(provenance.identity(wildcards, inputs, store))
    assert len({digest(each) for each in found}) == len(found)
    inputs["inventory"].unlink()
    with pytest.raises(FileNotFoundError):
        provenance.identity(wildcards, inputs, store)


def test_a_module_that_was_moved_is_no_empty_digest():
    with pytest.raises(ModuleNotFoundError, match=r"bitalloc\.swep"):
        provenance.source_digest("bitalloc.sweep", "bitalloc.swep")
