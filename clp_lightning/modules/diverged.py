"""A run whose numbers are not finite ends before they reach the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from .base import PolicyModule

__all__ = ["TrainingDiverged", "check_gradients", "newest_checkpoint"]


class TrainingDiverged(RuntimeError):
    """Loss, gradients or KL ran away; the weights have not been touched by this step."""


def check_gradients(module: PolicyModule, gradients: list[Tensor]) -> float:
    """Ends the run on all ranks together where gradients are not finite; the loss may still be.

    Under float16 they may overflow: the step is left out, and the loss scaled down.

    Args:
        module: Its trainer knows the precision.
        gradients: Of an optimizer step, over all ranks.

    Returns:
        The norm of all of them together; of shards, of the whole.

    Raises:
        TrainingDiverged: says what to do.
    """
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    plugin: Any = module.trainer.precision_plugin
    if not math.isfinite(norm) and getattr(plugin, "scaler", None) is None:
        raise TrainingDiverged(
            f"The gradients at step {module.global_step} are not finite. "
            f"{newest_checkpoint(module)} Try a smaller lr, or float32 instead of bf16."
        )
    return norm


def newest_checkpoint(module: PolicyModule) -> str:
    """A sentence that says where it lies."""
    callback = module.trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    return f"The newest checkpoint is {path}." if path else "No checkpoint was written."
