"""Weights that are split over devices (FSDP2, Lightning's ``ModelParallelStrategy``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from .base import PolicyModule

__all__ = ["check_strategy", "device_only", "shard"]


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that split the weights in other ways than ``shard``.

    Raises:
        ValueError: names the strategies that there are.
    """
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"{type(strategy).__name__} would split weights that the conditioner merges. Use "
            "strategy: ddp, or, where one device cannot hold the model, ModelParallelStrategy "
            "(FSDP2, with save_distributed_checkpoint: false)."
        )


def device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` as far as it moves tensors; what it converts to another type is moved only."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def shard(module: PolicyModule, *further: nn.Module) -> None:
    """Splits the weights where the strategy is one for sharded ones; else does nothing.

    Args:
        module: Its policy is built.
        further: Modules with parameters beside the policy.

    Raises:
        ValueError: the strategy would split single products too (tensor parallelism).
    """
    mesh = module._device_mesh  # the strategy's
    if mesh is None or module.policy.is_sharded:
        return
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size is {size}; the weights are sharded, not the products: set "
            "ModelParallelStrategy's tensor_parallel_size to 1 and data_parallel_size to the "
            "number of devices."
        )
    # `precision: bf16-true` before the split: `device_only` keeps it from what is split.
    module.trainer.precision_plugin.convert_module(module)
    module.policy.shard(mesh["data_parallel"])
    for each in further:
        fully_shard(each, mesh=mesh["data_parallel"])
