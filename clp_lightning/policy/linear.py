"""Frozen linear layers on the CPU: one product of rows, by oneDNN.

Torch's default float32 product on the CPU is about half as fast as oneDNN's, which is as exact
where the processor has no AMX unit (there it would compute in bfloat16, and is left alone). The
switch is global and slows tiny attention products down, so it is thrown for these products only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["speed_up_frozen_linears"]

_WORTH = 2**16  # numbers in a weight; for a smaller product the switch costs more than it saves


def speed_up_frozen_linears(model: nn.Module) -> None:
    """Replaces the forward of every large frozen ``nn.Linear``; values change by rounding only."""
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.numel() < _WORTH:
            continue
        if not any(p.requires_grad for p in module.parameters()):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    plain = plain and not torch.is_autocast_enabled("cpu")
    # Merged full-rank weights stand here as tensors with a gradient of their own.
    if not (plain and _helps()) or weight.requires_grad:
        return nn.Linear.forward(layer, x)
    out: Tensor = _FrozenLinear.apply(x, weight, layer.bias)
    return out


@cache
def _helps() -> bool:
    return torch.backends.mkldnn.is_available() and not torch.cpu._is_amx_tile_supported()


@contextmanager
def _onednn() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _FrozenLinear(torch.autograd.Function):
    """``x W' + b`` with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        with _onednn():
            # Rows, because a slice of a (B, T, d) tensor would copy the weight for every b.
            out = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with _onednn():
            back = grad.reshape(-1, grad.shape[-1]) @ weight
        return back.view(*grad.shape[:-1], -1), None, None
