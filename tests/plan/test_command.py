"""``python -m clp_lightning plan``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clp_lightning.__main__ import run
from tests.runs import run_config, write_config


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    run(["plan", *args, "--json"])
    return json.loads(capsys.readouterr().out)


def test_table_devices_and_verdict(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 4}}
    # Of a machine that this one is not.
    there = {"accelerator": "gpu", "devices": 4, "num_nodes": 2, "precision": "bf16-true"}
    config = run_config(tmp_path, tiny_folder(), strategy=strategy, **there)
    path = write_config(tmp_path / "run.yaml", config)
    sharded = planned(capsys, "--config", path)
    assert (sharded["devices"], sharded["shard_group"], sharded["prompts"]) == (8, 4, 2)
    config["trainer"]["strategy"] = "ddp"
    copied = planned(capsys, "--config", write_config(tmp_path / "ddp.yaml", config))
    alone = planned(capsys, "--config", str(tmp_path / "ddp.yaml"), "--devices", "1")
    one, each, part = (found["phases"]["sampling"] for found in (alone, copied, sharded))
    assert one["base"] == each["base"] == 4 * part["base"]
    assert each["communication"] == each["gradients"]
    assert one["communication"] == 0 < part["communication"]
    assert alone["fits"]

    config["trainer"] |= {"precision": "32-true"}
    path = write_config(tmp_path / "exact.yaml", config)
    exact = planned(capsys, "--config", path, "--devices", "1")
    assert exact["phases"]["sampling"]["base"] > 1.9 * one["base"]
    path = str(tmp_path / "run.yaml")
    run(["plan", "--config", path, "--memory", "0.0001"])
    out = capsys.readouterr().out
    assert "computed, not run" in out and "KV cache" in out
    assert "does not fit into 0.0001 GB (8 devices, weights sharded over 4)" in out


def test_what_cannot_be_planned(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path, tiny_folder())
    path = write_config(tmp_path / "run.yaml", config)
    with pytest.raises(SystemExit):
        run(["plan", "--config", path])
    assert "give --devices" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["plan", "--config", path, "--devices", "0"])
    assert "at least 1" in capsys.readouterr().err
