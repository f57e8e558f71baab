"""The contract with Lepton's own client: what the plugin posts it validates, what the stand-in answers it reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ..workflow.conftest import TARGETS, Project
from .project import SITE, Toy
from .standin import TOKEN, Standin

PYTHON = os.environ.get("LEPTONAI_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="leptonai wants an environment of its own (it pins httpx): `make test-lepton` makes one"
)


@pytest.fixture
def standin(tmp_path):
    standin = Standin(tmp_path / "standin")
    yield standin
    standin.close()


def client(standin: Standin, tmp_path: Path) -> str:
    """What leptonai says to all bodies that were posted, and to the stand-in."""
    done = subprocess.run(
        [PYTHON, str(Path(__file__).parent / "sdk.py"), TOKEN, standin.url], input=json.dumps(standin.bodies()),
        capture_output=True, text=True, check=False, timeout=120,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LEPTON_CACHE_DIR": str(tmp_path / "lepton")},
    )  # fmt: skip
    return done.stdout + done.stderr


def test_leptonai_takes_every_posted_body_and_reads_every_answer(standin, tmp_path):
    mount = {**SITE["mounts"][0], "mount_options": {"read_only": False}}
    toy = Toy(tmp_path / "toy", standin, env={"FOO": "bar"}, image_pull_secrets=["registry"], mounts=[mount])
    assert toy.run() == 0, toy.output()
    assert client(standin, tmp_path) == "2 bodies valid\n"


def test_the_tiny_chain_end_to_end_with_the_profile(standin, tmp_path):
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    sheet = project.folder / "config/models.yaml"
    sheet.write_text(sheet.read_text().replace("device: cpu", "device: auto"))
    site = {**SITE, "shapes": [{"name": "cpu.small", "gpu": 0}, {"name": "gpu.a10", "gpu": 1}]}
    (project.folder / "profiles/lepton/site.yaml").write_text(yaml.safe_dump(site))
    command = [sys.executable, "-m", "snakemake", *TARGETS, "--profile", "profiles/lepton", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--seconds-between-status-checks", "2"], cwd=project.folder, capture_output=True, text=True,
        check=False, env={**os.environ, **standin.environment(), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert (project.folder / "results/tiny/goodhart.png").stat().st_size > 20_000
    placed = {
        (job.id.removeprefix("smk-").rpartition("-")[0].rpartition("-")[0], job.body["spec"]["resource_shape"])
        for job in standin.jobs.values()
    }
    on_gpus, elsewhere = ({rule for rule, shape in placed if shape.startswith(kind)} for kind in ("gpu", "cpu"))
    assert on_gpus >= {"calibrate", "sweep", "sweep-sensitivity", "evaluate", "compress"}
    assert elsewhere >= {"retrieve-model", "fit", "allocate", "analyze"} and not on_gpus & elsewhere
    assert not standin.running() and not standin.doubles() and set(standin.states()) == {"Completed"}
    assert client(standin, tmp_path) == f"{len(standin.jobs)} bodies valid\n"
