"""What a user of ``python -m clp_lightning`` sees when something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clp_lightning.__main__ import run
from clp_lightning.cli import main
from tests.runs import run_config, write_config


def test_an_error_is_one_line(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config(tmp_path, tiny_folder()))
    asked = ["validate", "--config", config, "--ckpt_path", str(tmp_path / "nowhere")]
    with pytest.raises(SystemExit) as stopped:
        run(asked)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert "error: There is no checkpoint at" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("CLP_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run(asked)


def test_evaluating_leaves_the_record_of_training_alone(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config(tmp_path, tiny_folder()))
    main(["fit", "--config", config])
    record = tmp_path / "run" / "config.yaml"
    before = record.read_text()
    asked = ["validate", "--config", config, "--ckpt_path", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="another rank"):
        main([*asked, "--model.conditioner.init_args.rank=4"])
    main(asked)
    assert record.read_text() == before


def test_an_untrained_policy_is_not_measured_in_silence(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", run_config(tmp_path, tiny_folder()))
    with pytest.warns(UserWarning, match="before training"):
        main(["validate", "--config", config])
