"""The contract with Lepton's own client: what the plugin posts it validates, what the stand-in answers it reads."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from .project import Toy
from .standin import TOKEN, Standin

PYTHON = os.environ.get("LEPTONAI_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="leptonai wants an environment of its own (it pins httpx): `make test-lepton` makes one"
)


def test_leptonai_takes_every_posted_body_and_reads_every_answer(tmp_path):
    standin = Standin(tmp_path / "standin")
    try:
        toy = Toy(
            tmp_path / "project", standin, env={"FOO": "bar"}, image_pull_secrets=["registry"],
            mounts=[{"path": "/proj", "from": "node-nfs:my-nfs", "mount_path": "/mnt/proj",
                     "mount_options": {"read_only": False}}],
        )  # fmt: skip
        assert toy.run() == 0, toy.output()
        command = [PYTHON, str(Path(__file__).parent / "sdk.py"), TOKEN, standin.url]
        done = subprocess.run(
            command, input=json.dumps(standin.bodies()), capture_output=True, text=True, check=False, timeout=120,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LEPTON_CACHE_DIR": str(tmp_path / "lepton")},
        )  # fmt: skip
    finally:
        standin.close()
    assert done.stdout == "2 bodies valid\n", done.stdout + done.stderr
