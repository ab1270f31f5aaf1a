"""The product of groups of rows with a mixture of weights of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import product

__all__ = ["grouped_linear"]

# Elements of the merged weights of all groups that are there at once: on the CPU as many as a
# cache holds; elsewhere starting an operation is what costs.
_BLOCK, _BLOCK_ELSEWHERE = 2**20, 2**26


def grouped_linear(
    x: Tensor, weight: Tensor, deltas: Sequence[Tensor], coefficients: Tensor
) -> Tensor:
    """``x_g (W + sum_i c_gi D_i)'`` for G groups of as many consecutive rows each.

    Every group's weight is merged, a few output features at a time, and again for the gradient.
    Cheaper than mixing outputs, which takes a product for every delta, where a group has many
    positions.

    Args:
        x: Shape (B, ..., in), B a multiple of G.
        weight: W, shape (out, in); gets no gradient.
        deltas: D_i, K of shape (out, in), in the precision in which they are added.
        coefficients: c, shape (G, K); gets no gradient.

    Returns:
        Shape (B, ..., out).

    Example:
        >>> x, delta = torch.ones(2, 1), torch.tensor([[1.0]])
        >>> grouped_linear(x, delta, [delta], torch.tensor([[0.0], [2.0]])).flatten()
        tensor([1., 3.])
    """
    out: Tensor = _Grouped.apply(x, weight, coefficients, *deltas)
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, coefficients: Tensor, *deltas: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, coefficients, *deltas)
        device = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        groups = x.reshape(len(coefficients), -1, x.shape[-1])
        out = groups.new_empty(*groups.shape[:2], len(weight))
        for block, merged in _merged(weight, coefficients, deltas):
            out[..., block] = product(groups, merged.to(x.dtype).mT)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, coefficients, *deltas = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        groups = x.reshape(len(coefficients), -1, x.shape[-1]).to(grad.dtype)
        up = grad.reshape(*groups.shape[:2], -1)
        # Half precision would be rounded again in every block.
        exact = torch.promote_types(grad.dtype, torch.float32)
        to_x = torch.zeros_like(groups, dtype=exact) if wanted[0] else None
        to_deltas = [
            torch.empty_like(d) if w else None for d, w in zip(deltas, wanted[3:], strict=True)
        ]
        by_delta = coefficients.to(deltas[0].dtype).T
        for block, merged in _merged(weight, coefficients, deltas):
            part = up[..., block].contiguous()
            if to_x is not None:
                to_x += product(part, merged.to(grad.dtype))
            if any(wanted[3:]):
                of_weights = product(part.mT, groups).flatten(1).to(by_delta.dtype)
                for own, found in zip(to_deltas, by_delta @ of_weights, strict=True):
                    if own is not None:
                        own[block] = found.view(-1, x.shape[-1])
        return None if to_x is None else to_x.view_as(x).to(x.dtype), None, None, *to_deltas


def _merged(
    weight: Tensor, coefficients: Tensor, deltas: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the output features, and every group's weights there, shape (G, features, in).

    Added in the deltas' precision, and rounded to the weight's once.
    """
    most = _BLOCK if weight.device.type == "cpu" else _BLOCK_ELSEWHERE
    features = max(1, most // (len(coefficients) * weight.shape[1]))
    columns = coefficients.to(deltas[0].dtype).T[..., None, None]
    for start in range(0, len(weight), features):
        block = slice(start, start + features)
        total = torch.addcmul(weight[block].to(columns.dtype), columns[0], deltas[0][block])
        for column, delta in zip(columns[1:], deltas[1:], strict=True):
            total.addcmul_(column, delta[block])
        yield block, total.to(weight.dtype)
