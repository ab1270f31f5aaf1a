from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clp_lightning.exact import ExactTask, build_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ExactTask], Path]:
    """The base of a task, built once; read it, do not write into it."""
    root = tmp_path_factory.mktemp("exact")

    def build(task: ExactTask) -> Path:
        name = "-".join(str(value) for value in task.arguments().values())
        return build_base(task, root / name)

    return build
