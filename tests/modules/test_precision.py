"""The Trainer's ``bf16-true`` halves the frozen base, and nothing that is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from clp_lightning import LoRA, Mixture, RunCheckpoint, SoftPrompt, SupervisedModule
from clp_lightning.conditioning import Gate
from clp_lightning.modules import Critic
from clp_lightning.modules.precision import check_quantised
from tests.runs import make_data, make_module, make_trainer


def trained(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.policy.trained_parameters().items()}


@pytest.mark.parametrize(
    "conditioner",
    [
        lambda: LoRA(rank=2, shared_rank=2, coefficients=Gate()),
        lambda: SoftPrompt(LoRA(rank=2, shared_rank=2)),
        lambda: Mixture("attention"),
    ],
    ids=["lora-gate", "soft-prompt", "mixture"],
)
def test_small_updates_reach_what_is_trained(
    conditioner: Callable[[], Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    # An update of 1e-5 is lost in a bfloat16 weight of 0.1, whose neighbours are 5e-4 away.
    options: dict[str, Any] = {"lr": 1e-5, "optimizer": torch.optim.SGD}
    module = make_module(tiny_folder(), conditioner=conditioner(), **options)
    trainer = make_trainer(tmp_path, RunCheckpoint(), precision="bf16-true", max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    after = trained(module)
    assert {value.dtype for value in after.values()} == {torch.float32}
    fresh = make_module(tiny_folder(), conditioner=conditioner(), **options)
    fresh.configure_model()
    moved = [(after[name] - before).abs().max() for name, before in trained(fresh).items()]
    assert 0 < max(moved) < 1e-2

    frozen = [p for p in module.policy.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    # Rotary frequencies: rounded ones would turn far positions too far.
    assert {b.dtype for b in module.buffers() if b.is_floating_point()} == {torch.float32}
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in after.items():
        torch.testing.assert_close(saved[f"policy.{name}"], value, rtol=0, atol=0)


def test_a_run_in_half_precision_ends_with_a_front(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), critic=Critic(), kl="vocabulary")
    trainer = make_trainer(tmp_path, precision="bf16-true", limit_val_batches=None)
    trainer.fit(module, make_data(tmp_path))
    trainer.validate(module, make_data(tmp_path), verbose=False)
    assert module.front_report.scalars()["kl"] < 1
    assert module.rewards.mean.dtype == torch.float32
    assert {p.dtype for p in module.critic.parameters()} == {torch.float32}


def test_the_supervised_module_too(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = SupervisedModule(str(tiny_folder()), response_column="answer", lora_rank=2)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "max_steps": 2}
    trainer = Trainer(default_root_dir=tmp_path, precision="bf16-true", **options)
    trainer.fit(module, make_data(tmp_path))
    assert {value.dtype for value in trained(module).values()} == {torch.float32}


def test_a_base_of_bitsandbytes_is_not_trained_on_the_cpu() -> None:
    class Params4bit(nn.Parameter):
        __module__ = "bitsandbytes.nn.modules"

    model = nn.Linear(2, 2)
    check_quantised(model)
    model.weight = Params4bit(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="train it on a GPU"):
        check_quantised(model)
