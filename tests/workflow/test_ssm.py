"""The figures of a Mamba2 in the DAG: which jobs they are. What the jobs do is tested beside each of them."""

import pytest

from tests.workflow.conftest import Project

pytestmark = pytest.mark.workflow


def test_the_figures_of_a_mamba2_are_planned_from_its_weights(tmp_path):
    figures = [f"results/tiny_mamba2/{name}.png" for name in ("failure_modes", "profile")]
    status, output = Project(tmp_path).run(*figures, "-n")
    assert status == 0, output
    jobs = {line.split()[0] for line in output.splitlines() if len(line.split()) == 2 and line.split()[1] == "1"}
    wanted = {"schemes", "schemes_layerwise", "passkey", "drift", "failure_modes", "profile", "retrieve_model"}
    assert wanted <= jobs and "train_mamba2" not in jobs, jobs
