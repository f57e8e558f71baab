"""The digest of code moves with what a module imports, and only with that."""

import shutil
import subprocess
import sys
from pathlib import Path

import bitalloc
from bitalloc import provenance


def digest_in(folder: Path, *modules: str) -> str:
    code = f"from bitalloc.provenance import source_digest; print(source_digest(*{modules!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_a_change_deep_below_a_module_changes_its_digest(tmp_path):
    shutil.copytree(Path(bitalloc.__file__).parent, tmp_path / "bitalloc", ignore=shutil.ignore_patterns("__pycache__"))
    # sweep imports families; option imports the configuration, hence families, for type checkers only
    before = {name: digest_in(tmp_path, name) for name in ("bitalloc.sweep", "bitalloc.option")}
    with (tmp_path / "bitalloc/families.py").open("a") as file:
        file.write("\n# changed\n")
    after = {name: digest_in(tmp_path, name) for name in before}
    assert after["bitalloc.sweep"] != before["bitalloc.sweep"]
    assert after["bitalloc.option"] == before["bitalloc.option"]


def test_absent_packages_are_said_to_be_absent():
    assert provenance.run_record("no-such-package")["no-such-package"] == "absent"
