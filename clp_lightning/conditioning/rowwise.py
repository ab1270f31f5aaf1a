"""Mixing outputs instead of parameters: another preference in every row of the batch.

Linear layers, embeddings and norm scales are linear in their parameters, so
``y_b = f(theta_ref, x_b) + sum_i c_bi f(Delta_i, x_b)`` is what the merged parameters would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..functional import linear

__all__ = ["mix_rows", "why_not_rows"]

Place = tuple[nn.Module, str]
Mixed = dict[str, tuple[list[Tensor], list[int]]]


def why_not_rows(parameters: dict[str, list[Place]]) -> str | None:
    """Why these parameters, by name, cannot differ from row to row; None where they can."""
    for label, places in parameters.items():
        if "relative_attention_bias" in label:  # (query, key) positions in, no batch
            return f"the relative-position table {label} has no row axis"
        for module, name in places:
            # By exact type: position tables of some families derive from Embedding and do more.
            known = type(module) in (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)
            known = known or hasattr(module, "scalar_embed_scale")  # Gemma's scaled embedding
            if not known and not ("norm" in type(module).__name__.lower() and name == "weight"):
                return f"{label} of a {type(module).__name__} is not known to be linear"
    return None


@contextmanager
def mix_rows(
    mixtures: list[tuple[list[Place], list[Tensor], list[int]]], coefficients: Tensor
) -> Iterator[None]:
    """Inside the block, row b of every layer's input meets its own parameters.

    Args:
        mixtures: Where a parameter stands, its deltas, and their columns of ``coefficients``.
        coefficients: Shape (rows, K + 1).
    """
    layers: dict[nn.Module, Mixed] = {}
    for places, deltas, columns in mixtures:
        for module, name in places:
            layers.setdefault(module, {})[name] = (deltas, columns)
    before = {module: module.__dict__.get("forward") for module in layers}
    for module, mixed in layers.items():
        module.forward = partial(_forward, module, mixed, coefficients)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forward(module: nn.Module, mixed: Mixed, coefficients: Tensor, x: Tensor) -> Tensor:
    if len(x) != len(coefficients):
        raise ValueError(
            f"{len(coefficients)} preferences meet a layer input with {len(x)} rows, so rows and "
            f"preferences cannot be matched in {type(module).__name__} (a mixture-of-experts or "
            "flattened layer?). Use one preference per batch."
        )
    if isinstance(module, (nn.Linear, Conv1D)):
        return _linear(module, mixed, coefficients, x)
    if isinstance(module, nn.Embedding):
        out = F.embedding(x, module.weight, module.padding_idx)
        deltas, columns = mixed["weight"]
        for delta, column in zip(deltas, columns, strict=True):
            c = _shaped(coefficients[:, column], out.ndim).to(out)
            out = out + c * F.embedding(x, delta.to(out.dtype), module.padding_idx)
        return out * getattr(module, "scalar_embed_scale", 1.0)
    if isinstance(module, nn.LayerNorm):
        plain = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        out = plain * _rows(module, "weight", mixed, coefficients, x.ndim)
        if module.bias is not None:
            out = out + _rows(module, "bias", mixed, coefficients, x.ndim)
        return out
    # An RMS norm of some family: its scale multiplies, so it may as well have a row axis.
    weight = module._parameters["weight"]
    module._parameters["weight"] = _rows(module, "weight", mixed, coefficients, x.ndim)  # type: ignore[assignment]
    try:
        out = type(module).forward(module, x)
    finally:
        module._parameters["weight"] = weight
    return out


def _linear(module: Any, mixed: Mixed, coefficients: Tensor, x: Tensor) -> Tensor:
    """Inputs scaled per row and sets stacked along the input: one product."""
    transposed = isinstance(module, Conv1D)
    weight = module.weight.T if transposed else module.weight
    inputs, weights = [x], [weight]
    if "weight" in mixed:
        for delta, column in zip(*mixed["weight"], strict=True):
            inputs.append(x * _shaped(coefficients[:, column], x.ndim).to(x))
            weights.append((delta.T if transposed else delta).to(weight.dtype))
    out = linear(torch.cat(inputs, -1), torch.cat(weights, -1))
    if module.bias is not None:
        out = out + _rows(module, "bias", mixed, coefficients, x.ndim)
    return out


def _rows(module: nn.Module, name: str, mixed: Mixed, coefficients: Tensor, ndim: int) -> Tensor:
    """A vector parameter as every row has it, shape (rows, 1, ..., d)."""
    value = module._parameters[name]
    assert value is not None
    if name not in mixed:
        return value
    deltas, columns = mixed[name]
    stacked = torch.stack([delta.to(value.dtype) for delta in deltas])
    rows = value + coefficients[:, columns].to(value) @ stacked
    return rows.view(len(rows), *[1] * (ndim - 2), -1)


def _shaped(column: Tensor, ndim: int) -> Tensor:
    return column.view(-1, *[1] * (ndim - 1))
