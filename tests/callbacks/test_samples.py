"""What happens after the last step may fail; the trained weights must not be lost with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import MOD, FrontCallback, RunCheckpoint, SamplesCallback
from clp_lightning.rewards import RewardError
from tests.runs import make_data, make_module, make_trainer


def fails_in_sweeps(completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
    if trainer_state.global_step >= 2:
        raise ConnectionError("the judge is away")
    return [float(len(str(completion))) for completion in completions]


def test_training_is_saved_before_the_sweep(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    module = make_module(tiny_folder(), rewards={"kind": fails_in_sweeps})
    trainer = make_trainer(
        tmp_path,
        FrontCallback(),
        RunCheckpoint(every_n_train_steps=100, dirpath=str(tmp_path)),
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    with pytest.raises(RewardError, match="the judge is away"):
        trainer.fit(module, make_data(tmp_path))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_answers_are_shown(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    data = make_data(tmp_path)
    data.setup()
    trainer = make_trainer(tmp_path, SamplesCallback(), limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(make_module(tiny_folder()), data.train_dataloader(), [data.val_dataloader()])
    shown = capsys.readouterr().out
    assert "kind=1" in shown and "short=1" in shown


def test_a_mixture_cannot_be_trained(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = make_module(tiny_folder(), engine=MOD())
    with pytest.raises(ValueError, match="MOD samples from a mixture"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert not module.policy.is_built
