"""Supervised finetuning that is killed and resumed ends in the same bits, its folder included."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning.cli import main
from tests.processes import in_child
from tests.runs import run_config, write_config
from tests.test_kill import at
from tests.test_resume import kill, same

STEPS = 9  # three to a pass, the last of them of two batches instead of three


def config_of(folder: Path, base: Path, rank: int) -> str:
    config = run_config(
        folder, base, max_steps=STEPS, val_check_interval=8, accumulate_grad_batches=3
    )
    saved = {"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 2}}
    config["trainer"]["callbacks"] = [saved]
    arguments = {"response_column": "answer", "lora_rank": rank, "lr": 1e-2, "warmup_steps": 4}
    config["model"] = {
        "class_path": "SupervisedModule",
        "init_args": {"pretrained": str(base), **arguments},
    }
    return write_config(folder / "config.yaml", config)


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
def test_a_warm_up_killed_and_resumed(
    rank: int, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, whole, killed = tiny_folder(), tmp_path / "whole", tmp_path / "killed"
    assert in_child(main, ["fit", "--config", config_of(whole, base, rank)]) == 0
    command = ["fit", "--config", config_of(killed, base, rank), "--ckpt_path=last"]
    # In the third step; after the weights moved in the fourth; in the checkpoint of the fourth; in
    # the validation at the end of the second pass; between the two batches of the ninth step.
    moments = [
        at("backward", 8),
        at("optimizer", 2),
        at("checkpoint", 1, "replace"),
        kill("validation", 6),
        kill("window", 8),
    ]
    for moment in moments:
        assert in_child(main, [*command, *moment], timeout=300) == -signal.SIGKILL, moment
    assert in_child(main, command) == 0
    found, expected = (
        torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
        for folder in (killed, whole)
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(found[key], expected[key]), key
    weights, others = (
        (folder / "run/base/model.safetensors").read_bytes() for folder in (killed, whole)
    )
    assert weights == others != (base / "model.safetensors").read_bytes()
