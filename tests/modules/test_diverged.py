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

from clp_lightning import CLPCallback, CLPModule, RewardModule, RunCheckpoint, SupervisedModule
from clp_lightning.modules import TrainingDiverged
from tests.reward_models import make_data as pair_data
from tests.reward_models import pairs
from tests.runs import make_data, make_module, make_trainer


class Spoiled(CLPModule):
    """Its loss is not a number from the second step on."""

    def loss(self, logp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().loss(logp, *args, **kwargs)
        return loss if self.global_step < 1 else loss * torch.nan


class Overflows(CLPModule):
    """Its gradients are infinite from the second step on; its loss is not."""

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().loss(*args, **kwargs)
        if self.global_step >= 1:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


@pytest.mark.parametrize("reason", ["loss", "gradients", "kl"])
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
    elif reason == "gradients":
        module, message = make_module(tiny_folder(), Overflows), "gradients at step 1 are not fin"
    else:
        # Step 0 is the reference, with KL 0; the first step, far too long, moves it.
        module = make_module(tiny_folder(), max_kl=0.01, lr=1.0)
        message = r"KL at step 1 is \d+\.\d\d nats per response, above max_kl=0.01"
    trainer = make_trainer(tmp_path, callback, max_steps=5, gradient_clip_val=1.0)
    with pytest.raises(TrainingDiverged, match=message) as raised:
        trainer.fit(module, make_data(tmp_path))
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


@pytest.mark.parametrize("kind", ["supervised", "reward"])
def test_finetuning_stops_at_gradients_that_are_not_finite(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module: Any
    if kind == "reward":
        module, data = RewardModule(str(tiny_folder())), pair_data(pairs(8), holdout=2)
    else:
        module, data = SupervisedModule(str(tiny_folder()), "answer"), make_data(tmp_path)
    step = module.training_step
    module.training_step = lambda *args: step(*args) * torch.inf
    trainer = make_trainer(tmp_path)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, CLPCallback)]
    with pytest.raises(TrainingDiverged, match="gradients at step 0 are not finite"):
        trainer.fit(module, data)
