"""What ends a run, on all ranks together: one that stops alone leaves the others waiting."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from ..rewards import RewardError, Scores
from ..types import Rollout
from .diverged import TrainingDiverged, newest_checkpoint

if TYPE_CHECKING:
    from .clp import CLPModule

__all__ = [
    "DropLimit",
    "ask_rewards",
    "check_step",
    "empty_front",
    "raise_together",
]


class DropLimit:
    """How many responses may be dropped before the run ends.

    Args:
        share: Of the responses of ten steps.

    Raises:
        ValueError: it is no share.
    """

    STEPS = 10

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"max_dropped is a share between 0 and 1; got {share}.")
        self.share = share
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.STEPS)

    def add(self, dropped: float, sampled: float) -> str | None:
        """Adds a step; what was lost once the newest ten lost more than ten may."""
        self._recent.append((dropped, sampled))
        lost, seen = map(sum, zip(*self._recent, strict=True))
        steps = len(self._recent)
        if lost <= self.share * seen * self.STEPS / steps:
            return None
        return f"{lost:.0f} of the {seen:.0f} responses of the last {steps} step(s)"

    def error(self, module: CLPModule, dropped: str) -> RewardError:
        """Says which rewards failed on any rank; to be called on all of them.

        Args:
            module: Its rewards know their problems.
            dropped: How many were dropped.
        """
        what = _problems(module)
        if not module.trainer.is_global_zero:
            return RewardError("Too many responses were dropped; rank 0 says why.")
        return RewardError(
            f"{dropped} were dropped, more than max_dropped={self.share:g} allows (that share of "
            f"{self.STEPS} steps). The last problems: {what or 'none'}. Mend the reward, let it be "
            "asked again (reward_retries), or raise max_dropped."
        )


def _problems(module: CLPModule) -> str:
    """What the rewards did wrong last, on every rank; to be called on all of them."""
    found = gather(module.trainer, module.rewards.problems)
    return "; ".join(f"'{name}' {problem}" for part in found for name, problem in part.items())


def empty_front(module: CLPModule, error: ValueError) -> ValueError:
    """``error`` of a front that lacks responses, and why; to be called on all ranks.

    Args:
        module: Its rewards know their problems.
        error: Says which point has none.
    """
    what = _problems(module)
    if not what:
        return error
    return RewardError(
        f"{error} All were dropped. The last problems: {what}. Mend the reward, or let it be asked "
        "again (reward_retries)."
    )


def ask_rewards(module: CLPModule, rollout: Rollout) -> Scores:
    """The scores of ``rollout``: what was asked about it ahead of time, or asked now.

    With several ranks, what a reward raises becomes ``module.failure`` and scores of nothing, for
    the next ``raise_together`` to tell the others; until then no reward is asked again.
    """
    asked, module.asked = module.asked, []
    if module.failure is None:
        try:
            if asked and module.rewards.are_about(asked, rollout):
                return module.rewards.answers(asked)
            scores: Scores = module.rewards(rollout, trainer_state=module.trainer_state())
            return scores
        except RewardError as error:
            if module.trainer.world_size == 1:
                raise
            module.failure = error
    return Scores.nothing(len(rollout), len(module.rewards.names), module.rewards.mean.device)


def raise_together(module: CLPModule) -> None:
    """Raises on every rank if one has a ``failure``; to be called on all of them.

    Raises:
        RewardError: on rank 0 what happened, on the others where to read it.
    """
    own, module.failure = module.failure, None
    texts = gather(module.trainer, own and str(own))
    first = next((rank for rank, text in enumerate(texts) if text), None)
    if first is None:
        return
    if module.trainer.is_global_zero:
        raise RewardError(texts[first]) from own
    raise RewardError(f"A reward failed on rank {first}; rank 0 says which.") from own


def check_step(module: CLPModule, step: dict[str, float]) -> None:
    """Ends the run on all ranks together, before the weights are touched.

    Args:
        module: The module.
        step: The reduced tally; loses what only this check needs.

    Raises:
        RewardError: a reward failed, or more were dropped than allowed.
        TrainingDiverged: the loss or the KL.
    """
    if step.pop("failed", 0.0):
        raise_together(module)
    if lost := module.drop_limit.add(step.get("dropped", 0.0), step["responses"]):
        raise module.drop_limit.error(module, f"Step {module.global_step}: {lost}")
    remedy = newest_checkpoint(module)
    if step.pop("not_finite"):
        raise TrainingDiverged(
            f"The loss at step {module.global_step} is not finite. {remedy} "
            "Try a smaller lr, gradient clipping, or bf16 instead of fp16."
        )
    if module.max_kl is not None and step.get("kl", 0.0) > module.max_kl:
        raise TrainingDiverged(
            f"The KL at step {module.global_step} is {step['kl']:.2f} nats per response, above "
            f"max_kl={module.max_kl}. {remedy} Try a smaller lr or a larger alpha."
        )


def gather(trainer: Trainer, value: Any) -> list[Any]:
    """``value`` of every rank; plain data."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
