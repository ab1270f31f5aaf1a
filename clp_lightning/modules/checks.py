"""What a Trainer may not ask of the library's modules, said before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

from .sharding import check_mesh, check_strategy

if TYPE_CHECKING:
    from .base import PolicyModule

__all__ = ["check_trainer"]


def check_trainer(module: PolicyModule) -> None:
    """Refuses what would fail late, or train something else without a word.

    Args:
        module: Its trainer has neither processes nor a mesh of devices yet.

    Raises:
        ValueError: says what to change.
    """
    trainer: Any = module.trainer
    check_strategy(type(trainer.strategy))
    check_mesh(trainer.strategy)
    if (number := trainer.accumulate_grad_batches) < 1:
        raise ValueError(f"accumulate_grad_batches is {number}; it must be at least 1.")
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                f"{name} copies the module before it has weights, so it would average nothing. "
                "Leave it out, or use EMAWeightAveraging or WeightAveraging with strategy: ddp or "
                "on one device."
            )
        if sharded and isinstance(callback, WeightAveraging):
            raise ValueError(
                f"{name} copies the module, and weights that are split over devices "
                "(ModelParallelStrategy) cannot be copied. Leave it out, or use strategy: ddp."
            )
