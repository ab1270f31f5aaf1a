"""Weights that are split over devices (FSDP2, Lightning's ``ModelParallelStrategy``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from .base import PolicyModule

__all__ = ["shard"]


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
    module.policy.shard(mesh["data_parallel"])
    for each in further:
        fully_shard(each, mesh=mesh["data_parallel"])
