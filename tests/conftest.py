import os

import pytest
from hypothesis import HealthCheck, settings

# read when triton is imported, which transformers does on its own: its kernels run without a GPU
os.environ["TRITON_INTERPRET"] = "1"
# read when torch is imported, here and by what tests start: pytest-xdist fills the cores already, and threads that wait
# for each other in matrices as small as these take longer than one that does the work
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

# no limit of 0.2 s for an example, which a busy machine breaks; and what one run finds every run finds
settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs of the workflow, the longest tests, first: pytest-xdist shares out the many short ones around them."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)
