"""An executed notebook from a script in the percent format.

`# %%` starts a cell of code, `# %% [markdown]` one of text.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path

from bitalloc.errors import BitallocError

REMEDY = "the notebook needs nbclient and ipykernel: pip install 'bitalloc[notebook]'"
TIMEOUT_S = 600  # of one cell


def cells(source: str) -> list[tuple[str, str]]:
    r"""Kind (markdown or code) and text of every cell; what comes before the first marker is none.

    >>> cells("x\n# %% [markdown]\n# Some *text*.\n#\n# More.\n\n# %%\nx = 1\n")
    [('markdown', 'Some *text*.\n\nMore.'), ('code', 'x = 1')]
    """
    found = []
    for mark, text in re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", source, re.M | re.S):
        if "[markdown]" in mark:
            found.append(("markdown", re.sub(r"^# ?", "", text, flags=re.M).strip()))
        else:
            found.append(("code", text.strip()))
    return found


def execute(source: str, folder: Path) -> str:
    """The notebook of `source`, run in `folder`, as JSON; without times, so that equal tables give equal notebooks.

    Raises `BitallocError` when the extra is not installed or a cell fails.
    """
    if not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))):
        raise BitallocError(REMEDY)
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    book = nbformat.v4.new_notebook()
    for place, (kind, text) in enumerate(cells(source)):
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        book.cells.append(make(text, id=f"cell-{place}"))
    with tempfile.TemporaryDirectory() as private:  # sockets, where ports could be reached by others
        runner = NotebookClient(
            book, timeout=TIMEOUT_S, kernel_name="python3", record_timing=False,
            resources={"metadata": {"path": str(folder)}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{private}/kernel"}}),
        )  # fmt: skip
        try:
            runner.execute()
        except CellExecutionError as error:
            raise BitallocError(f"a cell of the notebook fails with {error.ename}: {error.evalue}") from None
    return nbformat.writes(book)
