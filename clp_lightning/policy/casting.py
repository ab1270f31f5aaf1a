"""A model that computes with its weights in another precision for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..conditioning import Conditioner

__all__ = ["attention_alike", "in_half_precision", "weights_cast"]


def in_half_precision(model: PreTrainedModel) -> bool:
    """Whether a forward rounds so much, here and now, that another way to the same shows."""
    device = model.device.type  # of "meta" torch knows no autocast
    return model.dtype.itemsize < 4 or (device != "meta" and torch.is_autocast_enabled(device))


def attention_alike(
    model: PreTrainedModel, conditioner: Conditioner
) -> AbstractContextManager[None]:
    """Within it attention rounds alike with gradients and without.

    On the CPU torch's fused kernel has no gradient for a bias of positions that is trained (T5's),
    so that with one another kernel is taken, and an untrained policy would not be the reference.
    Not with checkpoints, which are computed again behind the block.
    """
    encodes = model.config.is_encoder_decoder and model.device.type == "cpu"
    if model.is_activation_checkpointing or not (encodes and in_half_precision(model)):
        return nullcontext()
    biases = {m for name, m in model.named_modules() if name.endswith("relative_attention_bias")}
    if biases.isdisjoint(biases if (c := conditioner.changed_layers()) is None else c):
        return nullcontext()
    alike: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return alike


@contextmanager
def weights_cast(
    model: nn.Module, dtype: torch.dtype, made: dict[Tensor, Tensor]
) -> Iterator[None]:
    """Inside the block all wider floating-point weights of ``model`` are copies in ``dtype``.

    Args:
        model: Any; quantised weights and buffers stay as they are.
        dtype: Of the copies.
        made: Copies by what they were made of: used again, and added to.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with weights_cast(layer, torch.bfloat16, {}):
        ...     layer.weight.dtype
        torch.bfloat16
        >>> layer.weight.dtype
        torch.float32
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None or not weight.is_floating_point():
                continue
            if weight.element_size() > dtype.itemsize:
                kept.append((module, name, weight))
    try:
        for module, name, weight in kept:
            if weight not in made:  # a tensor is alike only to itself, as a key
                made[weight] = weight.detach().to(dtype)
            module._parameters[name] = made[weight]  # type: ignore[assignment]
        yield
    finally:
        for module, name, weight in kept:
            module._parameters[name] = weight
