"""Studies in the DAG: which jobs they are, and bad names."""

import pytest

from tests.workflow.conftest import Project

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Project:
    """The workflow, and no results."""
    return Project(tmp_path_factory.mktemp("studies"))


def test_a_study_trains_what_it_lacks_and_leaves_out_what_is_skipped(bare):
    status, output = bare.run(
        "results/studies/tiny_scale/position.png", "-n", "--config", 'skip={gpt2_tiny_24: "too deep"}'
    )
    assert status == 0, output
    jobs = {
        line.split()[0]: int(line.split()[1])
        for line in output.splitlines()
        if len(line.split()) == 2 and line.split()[1].isdigit()
    }
    assert jobs["train_gpt2"] == jobs["study_evaluate"] == jobs["study_backends"] == jobs["retrieve_model"] == 2
    assert jobs["study"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["results/studies/tiny_scal/position.png"], "unknown study 'tiny_scal': did you mean 'tiny_scale'?"),
        (
            [
                "results/tiny/candidates.parquet",
                "--config",
                "models={tiny: {settings: {allocate: {plans: [mine.json]}}}}",
            ],
            "allocate.plans: mine.json does not exist",
        ),
    ],
)
def test_bad_names_are_one_line(bare, arguments, said):
    status, output = bare.run(arguments[0], "-n", *arguments[1:])
    assert status != 0 and said in output and "Traceback" not in output
