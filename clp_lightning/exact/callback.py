"""The front, with the one number that only an exact task can give: the closed gap."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..callbacks import FrontCallback
from ..modules import CLPModule
from ..types import Preference
from .curve import curve_report
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
    contexts = []
    for x in range(task.num_contexts):
        rollout = enumeration_rollout(module.policy, task, anything, [x])
        contexts.append(module.rewards.normalize(module.rewards(rollout).raw))
    return torch.stack(contexts).double().cpu()


class ExactFrontCallback(FrontCallback):
    """Adds the closed gap of every front, computed over all responses rather than sampled ones.

    It is (V - V_ref) / (V* - V_ref) at the grid's preferences with alpha in (0, 0.5]: logged as
    ``val/closed_gap`` and ``val/closed_gap_min``, and written to front.json, where
    ``closed_gap.points`` has it point by point (null where it is not defined). Contexts that a
    task keeps out of training have their own, ``closed_gap_unseen``. Needs an ``ExactDataModule``.

    With ``budgets`` the full grid is measured while training goes on, too:
    ``closed_gap_curve`` of front.json has a point for each budget, and the responses that were
    needed for 0.9, 0.95 and 0.99; loggers have it under ``curve/``. A resumed run keeps its points.

    Args:
        budgets: Numbers of sampled responses; a point of the curve is measured after the
            optimizer step that reaches one. No curve if None.
    """

    _constants: tuple[Tensor, Tensor] | None = None

    def __init__(self, budgets: list[int] | None = None) -> None:
        super().__init__()
        if not all(budget > 0 for budget in budgets or []):
            raise ValueError(f"budgets are numbers of responses above 0; got {budgets}.")
        self.budgets = budgets or []
        self._curve: list[dict[str, Any]] = []
        self._closed: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._constants, self._curve = None, []  # the points of a resumed run are loaded later
        if self.budgets and not _judged(_full_grid(pl_module)).any():
            raise ValueError(
                f"The curve of ExactFrontCallback needs an alpha in (0, {MAX_ALPHA}] in the grid."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self._curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._curve = list(state_dict["curve"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Adds a point to the curve where the step reached one of the budgets."""
        assert isinstance(pl_module, CLPModule)
        cost = pl_module.cost
        before = self._curve[-1]["responses"] if self._curve else 0
        # Without counts the run goes on from a checkpoint that does not know them.
        now = cost.counts["responses"] if cost.counts else before
        if not any(before < budget <= now for budget in self.budgets):
            return
        assert cost.counts is not None
        cost.stop()
        grid = _full_grid(pl_module)
        gaps = self._gaps(trainer, pl_module, grid[_judged(grid)])
        point: dict[str, Any] = {
            name: None if gap is None else {"mean": gap.mean().item(), "worst": gap.min().item()}
            for name, gap in zip(("seen", "unseen"), gaps, strict=True)
        }
        counts = {name: cost.counts[name] for name in ("responses", "sampled_tokens")}
        self._curve.append(counts | point)
        metrics = {f"curve/{name}": float(count) for name, count in counts.items()}
        for kind, both in point.items():
            metrics |= {f"curve/{kind}_{which}": value for which, value in (both or {}).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        cost.start()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        self._measure(trainer, pl_module, "test")

    def extra_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        curve = curve_report(self._curve) if self._curve else None
        return {**self._closed, "closed_gap_curve": curve}

    def _measure(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, CLPModule)
        grid = pl_module.eval_preferences
        judged = _judged(grid)
        gaps = self._gaps(trainer, pl_module, grid[judged])
        for name, gap in zip(("closed_gap", "closed_gap_unseen"), gaps, strict=True):
            self._closed[name] = None
            if gap is None:
                continue
            points: list[float | None] = [None] * len(grid)
            for row, value in zip(judged.nonzero().flatten().tolist(), gap.tolist(), strict=True):
                points[row] = value
            mean, worst = (gap.mean().item(), gap.min().item()) if len(gap) else (None, None)
            self._closed[name] = {"mean": mean, "min": worst, "points": points}
            if mean is not None and worst is not None:
                pl_module.log(f"{stage}/{name}", mean, prog_bar=name == "closed_gap")
                pl_module.log(f"{stage}/{name}_min", worst)

    def _gaps(
        self, trainer: Trainer, module: CLPModule, grid: Preference
    ) -> tuple[Tensor, Tensor | None]:
        """The closed gap of every preference, shape (G,), on seen and on unseen contexts."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ExactDataModule):
            raise TypeError(
                "ExactFrontCallback needs the task of an ExactDataModule, the data of this run are "
                f"{type(data).__name__}. Use FrontCallback, or pass an ExactDataModule."
            )
        unseen = data.task.unseen
        if not len(grid):
            none = torch.zeros(0)
            return none, none if unseen.any() else None
        if self._constants is None:  # of the whole run: neither reference nor rewards are trained
            rewards = exact_rewards(module, data.task)
            self._constants = exact_reference_logp(module.policy, data.task), rewards
        ref_logp, rewards = self._constants
        logp = exact_logp(module.policy, data.task, grid, module.engine)
        seen, rest = (
            closed_gap(logp[:, rows], ref_logp[rows], rewards[rows], grid) if rows.any() else None
            for rows in (~unseen, unseen)
        )
        assert seen is not None
        return seen, rest


def _full_grid(module: LightningModule) -> Preference:
    assert isinstance(module, CLPModule)
    return module.grid.preferences(module.rewards.names)


def _judged(grid: Preference) -> Tensor:
    """Where the closed gap is defined, shape (G,)."""
    return (grid.alpha > 0) & (grid.alpha <= MAX_ALPHA)
