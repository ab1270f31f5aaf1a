"""Runs notebooks and stores their outputs, but for warnings and progress bars.

python notebooks/store.py [NAME.ipynb ...]          all of them, in their folder, if none is named
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def is_kept(output: Any) -> bool:
    """Whether a reader wants to see it; of widgets only sliders, which say ``interactive``."""
    data = output.get("data", {})
    is_progress = WIDGET in data and "interactive" not in data["text/plain"]
    return output.get("name") != "stderr" and not is_progress


def store(path: Path) -> None:
    """Runs a notebook and writes it back."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        iopub_timeout=60,  # on a busy machine outputs come late, and would be dropped
        raise_on_iopub_timeout=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    has_sliders = False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # when each cell ran
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
            has_sliders |= any(WIDGET in output.get("data", {}) for output in cell.outputs)
    if not has_sliders:
        notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # whichever version it was
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for given in sys.argv[1:] or sorted(FOLDER.glob("*.ipynb")):
        store(Path(given).absolute())
