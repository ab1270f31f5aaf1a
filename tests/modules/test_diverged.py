"""A run that goes wrong stops, and leaves its last good checkpoint alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from clp_lightning import CLPModule, RunCheckpoint
from clp_lightning.modules import TrainingDiverged
from tests.runs import make_data, make_module, make_trainer


class Spoiled(CLPModule):
    """Its loss is not a number from the second step on."""

    def loss(self, logp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().loss(logp, *args, **kwargs)
        return loss if self.global_step < 1 else loss * torch.nan


@pytest.mark.parametrize("reason", ["loss", "kl"])
def test_a_diverged_run_stops_with_the_last_good_checkpoint(
    reason: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoints/last.ckpt"
    kept: dict[int, bytes] = {}

    class Keep(RunCheckpoint):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            kept[trainer.global_step] = path.read_bytes()

    callback = Keep(every_n_train_steps=1)
    if reason == "loss":
        module, message = make_module(tiny_folder(), Spoiled), "loss at step 1 is not finite"
    else:
        # Step 0 is the reference, with KL 0; the first step, far too long, moves it.
        module = make_module(tiny_folder(), max_kl=0.01, lr=1.0)
        message = r"KL at step 1 is \d+\.\d\d nats per response, above max_kl=0.01"
    with pytest.raises(TrainingDiverged, match=message) as raised:
        make_trainer(tmp_path, callback, max_steps=5).fit(module, make_data(tmp_path))
    assert str(path) in re.sub(r"\s", "", str(raised.value))
    assert list(kept) == [1] and path.read_bytes() == kept[1]
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 1
    # The step that was refused has not touched the weights.
    for name, parameter in module.policy.trained_parameters().items():
        assert torch.equal(state["state_dict"][f"policy.{name}"], parameter.cpu())


def test_without_a_checkpoint_it_says_so(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module: LightningModule = make_module(tiny_folder(), Spoiled)
    with pytest.raises(TrainingDiverged, match="No checkpoint was written"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
