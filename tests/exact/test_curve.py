from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from clp_lightning import (
    CLPCallback,
    CLPModule,
    ExactDataModule,
    ExactFrontCallback,
    ExactReward,
    ExactTask,
    FixedAlpha,
    Grid,
    HardTask,
    LoRA,
    RunCheckpoint,
)
from clp_lightning.exact import (
    closed_gap,
    curve_report,
    exact_logp,
    exact_reference_logp,
    responses_needed,
)

HARD = HardTask(num_tokens=3, length=2, num_unseen=2)
PLAIN = ExactTask(num_tokens=3, length=2, num_contexts=3)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.5, 100),  # there at the first point already
        (0.6, 100),
        (0.7, 200),  # half way from 0.6 to 0.8, and from 100 to 400 in the logarithm
        (0.8, 400),
        (0.85, 800),  # not 1600 or later, where the curve comes back
        (0.9, 1600),
        (0.95, None),
    ],
)
def test_responses_needed(level: float, expected: int | None) -> None:
    assert responses_needed([100, 400, 1600, 6400], [0.6, 0.8, 0.9, 0.7], level) == expected


def test_report_is_of_the_mean_on_seen_contexts() -> None:
    points = [
        {"responses": n, "seen": {"mean": mean, "worst": 0.0}, "unseen": None}
        for n, mean in ((100, 0.8), (400, 0.94))
    ]
    report = curve_report(points)
    assert report["points"] == points
    assert report["needed"] == {"0.9": round(100 * 4 ** (5 / 7)), "0.95": None, "0.99": None}


def fit(
    task: ExactTask, base: Path, root: Path, steps: int, ckpt: Path | None = None, **options: Any
) -> tuple[CLPModule, dict[str, Any]]:
    """A run of ``steps`` steps of 16 responses; the module and its front."""
    rewards = {f"r{i}": ExactReward(task, i) for i in range(task.num_rewards)}
    arguments = {"grid": Grid(1, [0.1, 0.9]), "small_grid": Grid(1, [0.9])} | options
    module = CLPModule(
        str(base),
        LoRA(),
        rewards,  # type: ignore[arg-type]
        samples_per_prompt=4,
        max_new_tokens=task.length,
        statistics_prompts=0,
        lr=1e-2,
        seed=0,
        **arguments,  # type: ignore[arg-type]
    )
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        max_steps=steps,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
        logger=CSVLogger(root, name="", version=""),
        log_every_n_steps=100,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            CLPCallback(alpha=FixedAlpha(0.1)),
            ExactFrontCallback([20, 40, 48, 96]),
            RunCheckpoint(every_n_train_steps=2),
        ],
    )
    data = ExactDataModule(task, str(base), copies=20, batch_size=2, seed=0)
    trainer.fit(module, data, ckpt_path=None if ckpt is None else str(ckpt))
    metrics: dict[str, Any] = json.loads((root / "front.json").read_text())["metrics"]
    return module, metrics


def test_curve_of_seen_and_unseen_contexts(
    base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    module, metrics = fit(HARD, base_folder(HARD), tmp_path, steps=6)
    points = metrics["closed_gap_curve"]["points"]
    # A step is 16 responses: the first step at or behind each budget, one point for 40 and 48.
    assert [point["responses"] for point in points] == [32, 48, 96]
    assert [point["sampled_tokens"] for point in points] == [64, 96, 192]

    # The last one, from the pieces; of the grid, alpha 0.1 only.
    grid = module.grid.preferences(module.rewards.names)[:4]
    logp = exact_logp(module.policy, HARD, grid)
    ref_logp = exact_reference_logp(module.policy, HARD)
    for kind, rows in (("seen", ~HARD.unseen), ("unseen", HARD.unseen)):
        gap = closed_gap(logp[:, rows], ref_logp[rows], HARD.rewards[rows], grid)
        expected = {"mean": gap.mean().item(), "worst": gap.min().item()}
        assert points[-1][kind] == pytest.approx(expected, abs=1e-5)
    assert points[-1]["seen"] != points[-1]["unseen"] != points[0]["unseen"]

    # The front of the end is the same policy.
    front, unseen = metrics["closed_gap"], metrics["closed_gap_unseen"]
    assert front["mean"] == pytest.approx(points[-1]["seen"]["mean"])
    assert unseen["mean"] == pytest.approx(points[-1]["unseen"]["mean"])
    assert unseen["min"] == pytest.approx(min(unseen["points"][:4]))
    assert front["points"][4:] == unseen["points"][4:] == [None] * 4

    logged = (tmp_path / "metrics.csv").read_text()
    assert "curve/unseen_worst" in logged and "val/closed_gap_unseen_min" in logged
    assert f"{points[0]['seen']['mean']}" in logged


def test_ordinary_task_has_no_unseen_contexts(
    base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    _, metrics = fit(PLAIN, base_folder(PLAIN), tmp_path, steps=2)
    assert [point["unseen"] for point in metrics["closed_gap_curve"]["points"]] == [None]
    assert metrics["closed_gap_unseen"] is None


def test_resumed_run_keeps_its_points(
    base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    base = base_folder(HARD)
    _, whole = fit(HARD, base, tmp_path / "whole", steps=6)
    # Begun with two points: at a single one, a run without them would measure it again.
    fit(HARD, base, tmp_path / "begun", steps=3)
    ckpt = tmp_path / "begun" / "checkpoints" / "last.ckpt"
    _, resumed = fit(HARD, base, tmp_path / "resumed", steps=6, ckpt=ckpt)
    assert resumed["closed_gap_curve"] == whole["closed_gap_curve"]
    assert len(whole["closed_gap_curve"]["points"]) == 3


def test_measuring_is_no_training(base_folder: Callable[[ExactTask], Path], tmp_path: Path) -> None:
    one, _ = fit(PLAIN, base_folder(PLAIN), tmp_path / "one", steps=4)
    other, _ = fit(PLAIN, base_folder(PLAIN), tmp_path / "other", steps=4, eval_samples=2)
    ours, theirs = one.policy.trained_parameters(), other.policy.trained_parameters()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.cost.to_dict()["responses"] == 64


def test_curve_needs_an_alpha_that_can_be_judged(
    base_folder: Callable[[ExactTask], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"alpha in \(0, 0.5\]"):
        fit(PLAIN, base_folder(PLAIN), tmp_path, steps=1, grid=Grid(1, [0.9]))


def test_budgets_are_checked() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ExactFrontCallback([0, 10])
