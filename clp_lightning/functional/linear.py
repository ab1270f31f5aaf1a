"""One product of rows with a weight, by the faster exact kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["linear", "product"]

_WORTH = 2**20  # multiplications; a smaller product takes less time than a Python function does
_SWITCH = RLock()  # two threads that throw it at once could leave it thrown


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W' + b``, as ``torch.nn.functional.linear``; on the CPU by the faster exact kernel.

    Torch's own float32 product is half as fast as oneDNN's on AMD's processors, where MKL does less
    than it can; on Intel's it is the faster one. oneDNN's is as exact where the processor has no
    AMX unit and, on ARM, no bfloat16 (with one it would compute in bfloat16). The switch is global
    and slows tiny attention products down, so it is thrown for this product only.

    Args:
        x: Shape (..., in).
        weight: Shape (out, in).
        bias: Shape (out,).

    Returns:
        Shape (..., out).

    Example:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    if not _pays(x, weight, bias):
        # Rows, because a slice of a (B, T, d) tensor would copy the weight for every b.
        whole = x.dim() <= 2 or x.device.type != "cpu" or x.is_contiguous()
        return F.linear(x, weight, bias) if whole else _of_rows(x, weight, bias)
    if torch.is_grad_enabled():
        out: Tensor = _Product.apply(x, weight, bias)
        return out
    return _product(x, weight, bias)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices, or of a batch of each, by the same choice of kernel.

    For gradients that are written by hand; it has none.
    """
    if not _fits(left.numel() * right.shape[-1], left, right):
        return left @ right
    with _onednn():
        return left @ right


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return _fits(x.numel() * len(weight), x, weight, bias) and (
        type(weight) in (Tensor, nn.Parameter)  # not a shard, not quantised
    )


def _fits(multiplications: int, *tensors: Tensor | None) -> bool:
    return (
        multiplications >= _WORTH
        and all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _helps()
    )


@cache
def _helps() -> bool:
    # By name: a measurement could choose otherwise when a run goes on, and so change its rounding.
    native = torch.backends.mkl.is_available() and "intel" in _processor().lower()
    return torch.backends.mkldnn.is_available() and not native and _is_exact()


def _processor() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name", ""))


def _is_exact() -> bool:
    return not (torch.cpu._is_amx_tile_supported() or torch.cpu.get_capabilities().get("bf16"))


@contextmanager
def _onednn() -> Iterator[None]:
    with _SWITCH:
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # precisions were set by torch.backends, which does not go with this
            yield
            return
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with _onednn():
        return _of_rows(x, weight, bias)


def _of_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """``x W' + b``; the products of its gradients take the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        with _onednn():
            to_x = (rows @ weight).view(*grad.shape[:-1], -1) if wanted[0] else None
            to_weight = rows.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
        return to_x, to_weight, rows.sum(0) if wanted[2] else None
