"""Weights that are split over devices (FSDP2, Lightning's ``ModelParallelStrategy``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from .base import PolicyModule

__all__ = ["check_mesh", "check_strategy", "device_only", "shard"]


def check_strategy(kind: type[Strategy]) -> None:
    """Refuses strategies that split the weights in other ways than ``shard``.

    Raises:
        ValueError: names the strategies that there are.
    """
    if issubclass(kind, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"{kind.__name__} would split weights that the conditioner merges. Use "
            "strategy: ddp, or, where one device cannot hold the model, ModelParallelStrategy "
            "(FSDP2, with save_distributed_checkpoint: false)."
        )


def check_mesh(strategy: Strategy) -> None:
    """Refuses sizes of a ``ModelParallelStrategy`` that are not one shard for each device.

    Args:
        strategy: One that a Trainer was made with.

    Raises:
        ValueError: says what the sizes must be.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    world = strategy.world_size
    sizes = strategy._data_parallel_size, strategy._tensor_parallel_size
    # As Lightning reads them, and its rule: their product is the number of devices.
    data = strategy.num_nodes if sizes[0] == "auto" else sizes[0]
    tensor = strategy.num_processes if sizes[1] == "auto" else sizes[1]
    remedy = f"set data_parallel_size to {world} and tensor_parallel_size to 1"
    if tensor != 1:
        said = f"auto, which is {tensor}" if sizes[1] == "auto" else tensor
        raise ValueError(
            f"ModelParallelStrategy's tensor_parallel_size is {said}; the weights are split over "
            f"the devices, not the products: {remedy}."
        )
    if data != world:
        said = f"auto, which is {data}" if sizes[0] == "auto" else data
        raise ValueError(
            f"ModelParallelStrategy's data_parallel_size is {said}, and devices x num_nodes is "
            f"{world}; the weights are split over all devices: {remedy}."
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
    """
    mesh = module._device_mesh  # the strategy's
    if mesh is None or module.policy.is_sharded:
        return
    # `precision: bf16-true` before the split: `device_only` keeps it from what is split.
    module.trainer.precision_plugin.convert_module(module)
    module.policy.shard(mesh["data_parallel"])
    for each in further:
        fully_shard(each, mesh=mesh["data_parallel"])
