"""How the learning rate goes over a run."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler

__all__ = ["LRDecay", "schedule"]

LRDecay = Literal["none", "linear", "cosine"]


def schedule(optimizer: Optimizer, warmup: int, decay: LRDecay, steps: float) -> LRScheduler:
    """The learning rate rises from 0 over ``warmup`` steps and falls to 0 at the run's end.

    The decay is in closed form, and its end is not in the checkpoint: a run that goes on with a
    larger max_steps is on the longer schedule, and neither stays at 0 nor rises again.

    Args:
        optimizer: Its groups keep their ratios.
        warmup: Optimizer steps; 0 for none.
        decay: ``none`` stays at the top, and other schedulers may be chained.
        steps: Optimizer steps of the whole run; infinite if unknown.

    Raises:
        ValueError: a decay to an end that is not known.
    """
    if decay == "none":
        return LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    if not math.isfinite(steps):
        raise ValueError(
            f"lr_decay={decay!r} needs to know where the run ends; set the Trainer's max_steps or "
            "max_epochs."
        )

    def share(step: int) -> float:
        done = min(1.0, step / steps)
        left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return left * min(1.0, (step + 1) / (warmup + 1))

    return LambdaLR(optimizer, share)
