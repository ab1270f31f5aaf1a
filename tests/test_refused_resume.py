"""A resume that is refused, or finds no last.ckpt, loses nothing of the run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy

from clp_lightning import RunCheckpoint
from clp_lightning.__main__ import run
from clp_lightning.checkpoints import checkpoint_file
from tests.processes import in_child
from tests.runs import make_data, make_module, make_trainer, run_config, write_config
from tests.test_crash import silent, told


@pytest.fixture(scope="module")
def trained(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder, tiny_folder(), max_steps=3, limit_val_batches=0)
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 1
    write_config(folder / "config.yaml", config)
    assert in_child(run, ["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, whose config says so."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace(str(trained), str(copy)))
    return copy


def steps_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def changed(folder: Path, **model: Any) -> list[str]:
    """The command that goes on with other settings of the model."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"] |= model
    path = write_config(folder / "other.yaml", config)
    return ["fit", "--config", path, "--ckpt_path=last", "--trainer.max_steps=4"]


@pytest.mark.parametrize("by", ["last", "run", "run/checkpoints/last.ckpt"])
def test_without_the_last_checkpoint_it_goes_on_from_the_one_before(by: str, folder: Path) -> None:
    place = folder / "run/checkpoints"
    (place / "last.ckpt").unlink()
    given = by if by == "last" else str(folder / by)
    go_on = ["fit", "--config", str(folder / "config.yaml"), f"--ckpt_path={given}"]
    assert in_child(silent, [*go_on, "--trainer.max_steps=3"], folder / "log.txt") == 0
    assert (steps_of(place / "previous.ckpt"), steps_of(place / "last.ckpt")) == (2, 3)
    rows = (folder / "run/metrics.csv").read_text().splitlines()
    assert len(rows) == 4  # of steps 0 to 2, under their names


def restored_late(args: list[str], log: Path) -> None:
    """As by strategies that shard weights: callbacks hear of the checkpoint after on_fit_start."""
    SingleDeviceStrategy.restore_checkpoint_after_setup = True  # type: ignore[assignment]
    silent(args, log)


@pytest.mark.parametrize("start", [silent, restored_late])
def test_a_run_that_is_over_keeps_its_rows(start: Callable[..., None], folder: Path) -> None:
    """Lightning calls no hook of training then."""
    again = [*changed(folder), "--trainer.max_steps=3"]
    assert in_child(start, again, folder / "log.txt") == 0, told(folder / "log.txt")
    rows = (folder / "run/metrics.csv").read_text().splitlines()
    assert len(rows) == 4  # of steps 0 to 2, under their names


def test_rows_of_a_run_that_is_restored_late_are_kept(folder: Path) -> None:
    assert in_child(restored_late, changed(folder), folder / "log.txt") == 0, told(
        folder / "log.txt"
    )
    rows = (folder / "run/metrics.csv").read_text().splitlines()
    assert len(rows) == 5  # of steps 0 to 3, under their names


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"rewards": {"kind": "tests.runs.kind", "loud": "tests.runs.loud"}},
            "The checkpoint has rewards",
        ),
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}},
            "`optimizer` is SGD, .* has .*betas, .* and not .*momentum",
        ),
    ],
)
def test_a_refused_one_leaves_logs_and_config(
    model: dict[str, Any], message: str, folder: Path
) -> None:
    files = ["metrics.csv", "config.yaml", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"]
    before = [(folder / "run" / name).read_bytes() for name in files]
    log = folder / "log.txt"
    for _ in range(2):
        assert in_child(silent, changed(folder, **model), log) == 2
        assert re.search(message, told(log)), told(log)
        assert [(folder / "run" / name).read_bytes() for name in files] == before
    assert not (folder / "run/.metrics.before.csv").exists()


def test_a_folder_is_no_checkpoint(folder: Path) -> None:
    last = folder / "run/checkpoints/last.ckpt"
    last.unlink()
    last.mkdir()
    for given in ("last", str(folder / "run"), str(last)):
        go_on = ["fit", "--config", str(folder / "config.yaml"), f"--ckpt_path={given}"]
        assert in_child(silent, go_on, folder / "log.txt") == 2
        line = told(folder / "log.txt")
        assert f"{last} is a folder" in line and "previous.ckpt" in line
    last.rmdir()
    with pytest.warns(UserWarning, match="missing"):
        assert checkpoint_file(last).name == "previous.ckpt"


def test_it_is_told(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_train_steps=1)
    make_trainer(tmp_path, checkpoint).fit(make_module(tiny_folder()), make_data(tmp_path))
    last = tmp_path / "checkpoints/last.ckpt"
    last.unlink()
    trainer = make_trainer(tmp_path, RunCheckpoint())
    with pytest.warns(UserWarning, match=rf"{last} is missing; .*previous\.ckpt, the one before"):
        trainer.fit(make_module(tiny_folder()), make_data(tmp_path), ckpt_path="last")
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {
                "callbacks": [
                    {
                        "class_path": "EarlyStopping",
                        "init_args": {"monitor": "val/valu", "check_on_train_epoch_end": True},
                    }
                ]
            },
            "EarlyStopping.monitor: .*`val/valu` which is not available.*`train/value`",
        ),
        ({"gradient_clip_val": float("nan")}, "trainer.gradient_clip_val is nan, which is no"),
        ({"gradient_clip_val": -1}, "trainer.gradient_clip_val must be above 0; got -1. Leave it"),
        ({"logger": False}, r"config.yaml cannot be written in .*another trainer.default_root_dir"),
    ],
)
def test_a_trainer_that_cannot_be(
    trainer: dict[str, Any], message: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = run_config(tmp_path, tiny_folder(), limit_val_batches=0, max_steps=1)
    callbacks = [{"class_path": "CLPCallback"}, *trainer.pop("callbacks", [])]
    config["trainer"] |= {"default_root_dir": str(tmp_path / "root"), "callbacks": callbacks}
    config["trainer"] |= {"limit_train_batches": 2, **trainer}
    (tmp_path / "root/config.yaml").mkdir(parents=True)  # where a file should be
    command = ["fit", "--config", write_config(tmp_path / "run.yaml", config)]
    assert in_child(silent, command, tmp_path / "log.txt") == 2
    assert re.search(message, told(tmp_path / "log.txt")), told(tmp_path / "log.txt")
