"""Folders and checkpoints that cannot be loaded say why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from clp_lightning import (
    RunCheckpoint,
    SteerablePolicy,
    SupervisedModule,
)
from tests.runs import make_data
from tests.steerables import make_steerable


@pytest.mark.parametrize("field", ["rewards", "adapters"])
def test_a_folder_cannot_point_outside_itself(
    field: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_steerable(tiny_folder()).save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy" / "clp.json"
    description = json.loads(file.read_text())
    description[field][0] = "../secret"
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="cannot be the name"):
        SteerablePolicy.from_pretrained(tmp_path / "policy")


@pytest.mark.parametrize(
    "class_path", ["subprocess.Popen", "os.system", "clp_lightning.Encoding", "pathlib.Path"]
)
def test_a_folder_runs_no_other_code(
    class_path: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_steerable(tiny_folder()).save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy" / "clp.json"
    description = json.loads(file.read_text())
    description["conditioner"] = {"class_path": class_path, "init_args": {}}
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="is not a Conditioner"):
        SteerablePolicy.from_pretrained(tmp_path / "policy")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _cut(folder / "clp.json"),
        lambda folder: _cut(folder / "kind" / "adapter_model.safetensors"),
        lambda folder: (folder / "weights.safetensors").unlink(),
        lambda folder: shutil.rmtree(folder / "short"),
        lambda folder: (folder / "clp.json").write_text('{"schema": 1}'),
    ],
    ids=["description", "adapter", "weights", "folder", "fields"],
)
def test_a_damaged_folder_is_named(
    damage: Callable[[Path], Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    make_steerable(tiny_folder()).save_pretrained(tmp_path / "policy")
    damage(tmp_path / "policy")
    with pytest.raises(ValueError, match=f"saved policy in {tmp_path / 'policy'} is damaged"):
        SteerablePolicy.from_pretrained(tmp_path / "policy")


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    contents: dict[str, tuple[Any, str]] = {
        "code.ckpt": ({"model": Path("x")}, "holds more than tensors and plain values"),
        "tensor.ckpt": (torch.zeros(2), "holds a Tensor, not a run's checkpoint"),
        "plain.ckpt": ({"state_dict": {}}, "was not written by clp_lightning"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            SteerablePolicy.from_pretrained(tmp_path / name)


def test_missing_policies_say_where_they_were_looked_for(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no policy at"):
        SteerablePolicy.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="was not found on the hub"):
        SteerablePolicy.from_pretrained("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        SteerablePolicy.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no revision 'v2': drop the revision"):
        SteerablePolicy.from_pretrained(tmp_path, revision="v2")
    trainer = Trainer(
        max_steps=1,
        default_root_dir=tmp_path,
        callbacks=[RunCheckpoint()],
        logger=False,
        accelerator="cpu",
    )
    warmup = SupervisedModule(str(tiny_folder()), response_column="answer", lora_rank=2)
    trainer.fit(warmup, make_data(tmp_path))
    with pytest.raises(ValueError, match="no policy with a dial"):
        SteerablePolicy.from_pretrained(tmp_path)
