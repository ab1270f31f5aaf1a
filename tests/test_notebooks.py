"""The notebooks run from a clean kernel, at settings that a test can afford."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.steerable.test_folder import FRONT
from tests.steerables import make_steerable

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 200_000
TINY_STEPS = {"steps": 2, "prompts_per_step": 2, "samples": 2}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings_cell(notebook: Any) -> Any:
    (cell,) = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    return cell


def run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """Runs a notebook in ``place`` with other settings, and returns what its cells print."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(place / variable.lower()))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = read(FOLDER / f"{name}.ipynb")
    cell = settings_cell(notebook)
    assigned = {n.id for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Name)}
    assert settings.keys() == assigned
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    client = NotebookClient(
        notebook,
        # Of a cell. ZeroMQ's wake-up can be missed when a reply comes while the next request is
        # sent; the reply is then seen when this time is over, so it also bounds what that costs.
        timeout=120,
        startup_timeout=300,
        iopub_timeout=60,  # on a busy machine outputs come late, and would be dropped
        raise_on_iopub_timeout=True,
        resources={"metadata": {"path": str(place)}},
    )
    client.execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [output.get("text", "") for output in outputs]
    shown += [str(value) for output in outputs for value in output.get("data", {}).values()]
    return "\n".join(shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any(o.get("data", {}).keys() & {"image/png", "text/html"} for o in outputs)
    assert path.stat().st_size < MAX_BYTES


def test_quickstart(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TINY_STEPS | {"held_out": 2, "statistics_prompts": 2, "max_new_tokens": 4}
    model = str(tiny_folder(chat=True, max_position_embeddings=1024))
    folder = str(tmp_path / "run")
    shown = run("01_quickstart", tmp_path, monkeypatch, model=model, folder=folder, **settings)
    assert "{'support': 0.5, 'short': 0.5} ->" in shown
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


def test_steering(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(tiny_folder(chat=True))
    make_steerable(base, front=FRONT).save_pretrained(tmp_path / "policy")
    settings = {"run": "policy", "base": base, "document": "Tea.", "max_new_tokens": 4}
    shown = run("02_steering", tmp_path, monkeypatch, **settings)
    assert "FloatSlider(value=0.1" in shown  # alpha stands where the front was measured
    assert "<th>response</th>" in shown


@pytest.mark.slow
def test_own_reward_and_conditioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("03_own_reward_and_conditioner", tmp_path, monkeypatch, **TINY_STEPS)
    assert "<th>vowels</th>" in shown and "<Figure" in shown


@pytest.mark.slow
def test_exact_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TINY_STEPS | {"divisions": 2, "alpha": 0.1}
    shown = run("04_exact_optimum", tmp_path, monkeypatch, **settings)
    assert "closed gap" in shown and "<Figure" in shown
