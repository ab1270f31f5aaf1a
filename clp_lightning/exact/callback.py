"""The front, with the one number that only an exact task can give: the closed gap."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..callbacks import FrontCallback
from ..modules import CLPModule
from ..types import Preference
from .data import ExactDataModule
from .evaluate import enumeration_rollout, exact_logp, exact_reference_logp
from .optimum import MAX_ALPHA, closed_gap
from .task import ExactTask

__all__ = ["ExactFrontCallback", "exact_rewards"]


def exact_rewards(module: CLPModule, task: ExactTask) -> Tensor:
    """What ``module`` maximises: its own rewards of every response, as it normalises them.

    Returns:
        Float64 on the CPU, shape (X, S, K), rewards in the order of the module's names.
    """
    k = len(module.rewards.names)
    anything = Preference.single([1.0 / k] * k, 1.0)
    rollout = enumeration_rollout(module.policy, task, anything, range(task.num_contexts))
    scores = module.rewards.normalize(module.rewards(rollout).raw)
    return scores.double().cpu().reshape(task.num_contexts, -1, k)


class ExactFrontCallback(FrontCallback):
    """Adds the closed gap of every front, computed over all responses rather than sampled ones.

    It is (V - V_ref) / (V* - V_ref) at the grid's preferences with alpha in (0, 0.5]: logged as
    ``val/closed_gap`` and ``val/closed_gap_min``, and written to front.json, where
    ``closed_gap.points`` has it point by point (null where it is not defined). Needs an
    ``ExactDataModule``.
    """

    _closed_gap: dict[str, Any] | None = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        self._measure(trainer, pl_module, "test")

    def extra_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {"closed_gap": self._closed_gap}

    def _measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ExactDataModule):
            raise TypeError(
                "ExactFrontCallback needs the task of an ExactDataModule, the data of this run are "
                f"{type(data).__name__}. Use FrontCallback, or pass an ExactDataModule."
            )
        assert isinstance(pl_module, CLPModule)
        grid = pl_module.eval_preferences
        judged = (grid.alpha > 0) & (grid.alpha <= MAX_ALPHA)
        points: list[float | None] = [None] * len(grid)
        if not judged.any():
            self._closed_gap = {"mean": None, "min": None, "points": points}
            return
        grid = grid[judged]
        logp = exact_logp(pl_module.policy, data.task, grid, pl_module.engine)
        ref_logp = exact_reference_logp(pl_module.policy, data.task)
        gap = closed_gap(logp, ref_logp, exact_rewards(pl_module, data.task), grid)
        mean, worst = gap.mean().item(), gap.min().item()
        for row, value in zip(judged.nonzero().flatten().tolist(), gap.tolist(), strict=True):
            points[row] = value
        self._closed_gap = {"mean": mean, "min": worst, "points": points}
        pl_module.log(f"{stage}/closed_gap", mean, prog_bar=True)
        pl_module.log(f"{stage}/closed_gap_min", worst)
