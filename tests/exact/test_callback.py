from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from clp_lightning import (
    CLPCallback,
    CLPModule,
    ExactDataModule,
    ExactFrontCallback,
    ExactReward,
    ExactTask,
    Fixed,
    FixedAlpha,
    Grid,
    LoRA,
    PromptDataModule,
)
from clp_lightning.exact import (
    closed_gap,
    exact_logp,
    exact_reference_logp,
    exact_rewards,
    optimum,
)


def make_module(task: ExactTask, folder: Path, **options: object) -> CLPModule:
    # The bank's order is not the task's: the gap must go by name.
    rewards = {"second": ExactReward(task, 1), "first": ExactReward(task, 0)}
    arguments = {"statistics_prompts": 0, "lr": 3e-3, "grid": Grid(2, [0.1, 0.8]), "seed": 0}
    return CLPModule(
        str(folder),
        LoRA(),
        rewards,  # type: ignore[arg-type]
        max_new_tokens=task.length,
        samples_per_prompt=8,
        **(arguments | options),  # type: ignore[arg-type]
    )


def make_trainer(folder: Path, **options: object) -> Trainer:
    preferences = CLPCallback(Fixed({"first": 0.5, "second": 0.5}), FixedAlpha(0.1))
    arguments = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[preferences, ExactFrontCallback()],
        enable_model_summary=False,
        **(arguments | options),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "stop"])
def task(request: pytest.FixtureRequest) -> ExactTask:
    return ExactTask(stop=request.param, num_contexts=3)


def test_training_closes_some_of_the_gap(
    task: ExactTask, base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    folder = base_folder(task)
    module = make_module(task, folder)
    data = ExactDataModule(task, str(folder), copies=40, batch_size=6, seed=0)
    trainer = make_trainer(tmp_path, max_steps=20, num_sanity_val_steps=0)
    trainer.validate(module, data, verbose=False)
    before = json.loads((tmp_path / "front.json").read_text())["metrics"]["closed_gap"]
    points = before.pop("points")
    assert points[:3] == pytest.approx([0, 0, 0], abs=1e-6) and points[3:] == [None] * 3
    assert before == pytest.approx({"mean": 0, "min": 0}, abs=1e-6)
    assert trainer.callback_metrics["val/closed_gap"] == pytest.approx(0, abs=1e-6)

    trainer.fit(module, data)
    front = json.loads((tmp_path / "front.json").read_text())
    after = front["metrics"]["closed_gap"]
    assert 0.1 < after["mean"] < 1
    assert after["min"] <= after["mean"]
    assert trainer.callback_metrics["val/closed_gap"] == pytest.approx(after["mean"])
    assert trainer.callback_metrics["val/closed_gap_min"] == pytest.approx(after["min"])

    # The same from the pieces, at the three points of alpha 0.1 only: 0.8 is not judged.
    grid = module.grid.preferences(module.rewards.names)[:3]
    rewards = task.rewards[..., [1, 0]]
    torch.testing.assert_close(exact_rewards(module, task), rewards, rtol=1e-6, atol=1e-6)
    logp, ref_logp = (
        exact_logp(module.policy, task, grid),
        exact_reference_logp(module.policy, task),
    )
    gap = closed_gap(logp, ref_logp, rewards, grid)
    assert after["mean"] == pytest.approx(gap.mean().item(), abs=1e-5)
    assert after["points"] == [*map(pytest.approx, gap.tolist()), None, None, None]
    assert (optimum(ref_logp, rewards, grid)[0].mean(-1) > 1).all()


def test_gap_is_of_what_training_maximises(
    base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    # With normalisation on, the rewards of V are the normalised ones.
    task = ExactTask(num_contexts=3)
    module = make_module(task, base_folder(task), statistics_prompts=6, statistics_samples=4)
    data = ExactDataModule(task, str(base_folder(task)), copies=2, batch_size=6, seed=0)
    make_trainer(tmp_path).validate(module, data, verbose=False)
    mean, std = module.rewards.mean.double(), module.rewards.std.double()
    assert (std - 1).abs().min() > 1e-3
    expected = (task.rewards[..., [1, 0]] - mean) / std
    torch.testing.assert_close(exact_rewards(module, task), expected, rtol=1e-5, atol=1e-5)


def test_gap_is_null_where_no_alpha_can_be_judged(
    base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    task = ExactTask(num_contexts=3)
    module = make_module(task, base_folder(task), grid=Grid(1, [0.9]))
    data = ExactDataModule(task, str(base_folder(task)), copies=2, batch_size=6, seed=0)
    (numbers,) = make_trainer(tmp_path).test(module, data, verbose=False)
    assert "test/closed_gap" not in numbers
    assert not math.isnan(numbers["test/value"])
    front = json.loads((tmp_path / "front.json").read_text())
    assert front["metrics"]["closed_gap"] == {"mean": None, "min": None, "points": [None, None]}


def test_other_data_is_refused(base_folder: Callable[[ExactTask], Path], tmp_path: Path) -> None:
    task = ExactTask(num_contexts=3)
    module = make_module(task, base_folder(task))
    source = ExactDataModule(task, str(tmp_path)).source
    data = PromptDataModule(source, holdout=2)
    with pytest.raises(TypeError, match="pass an ExactDataModule"):
        make_trainer(tmp_path).validate(module, data, verbose=False)
