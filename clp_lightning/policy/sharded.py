"""A conditioned model whose weights are split over devices (FSDP2)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from ..conditioning import Conditioner
from .blocks import blocks

__all__ = ["shard_model"]


def shard_model(model: PreTrainedModel, conditioner: Conditioner, mesh: DeviceMesh) -> None:
    """Splits the weights, block by block, over the devices of ``mesh``."""
    conditioner.move_in()
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if model.config.is_encoder_decoder:
        # By the model's hooks, which gather what lies outside the blocks.
        model.encode_whole = partial(_encode, model)  # type: ignore[assignment]
        register_fsdp_forward_method(model, "encode_whole")
    conditioner.take_shards()
    if next(conditioner.coefficients.parameters(), None) is not None:
        fully_shard(conditioner.coefficients, mesh=mesh)


def _encode(model: PreTrainedModel, **inputs: Tensor) -> Any:
    return model.get_encoder()(**inputs)
