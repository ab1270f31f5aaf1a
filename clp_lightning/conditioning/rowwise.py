"""Mixing outputs instead of parameters: another preference in every row of the batch.

Linear layers, embeddings and norm scales are linear in their parameters, so
``y_b = f(theta_ref, x_b) + sum_i c_bi f(Delta_i, x_b)`` is what the merged parameters would give.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..functional import linear
from ..functional.grouped import grouped_linear
from .base import Conditioner, Scope

__all__ = [
    "Change",
    "Mixed",
    "Place",
    "RowForwards",
    "embedding_scale",
    "mixed_forward",
    "why_not_rows",
]

# Positions a preference from which merging for it costs less than one more product for every delta;
# on GPUs an estimate.
_WORTH_MERGING = {"cpu": 64}
_WORTH_ELSEWHERE = 512

Place = tuple[nn.Module, str]
# Where a parameter stands, its deltas, and their columns of the coefficients.
Change = tuple[list[Place], list[Tensor], list[int]]
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


class RowForwards:
    """Forwards by which row b of every layer's input meets its own parameters.

    The same objects each time they are asked for, so that a program which was compiled with them
    stays valid.

    Args:
        owner: Whose open scope has the coefficients, one for every row, and the cache.
    """

    def __init__(self, owner: Conditioner) -> None:
        self._owner = owner
        self._made: dict[tuple[int, ...], dict[nn.Module, Callable[..., Tensor]]] = {}

    def of(self, changes: list[Change]) -> dict[nn.Module, Callable[..., Tensor]]:
        """By layer, for all parameters that are conditioned."""
        key = tuple(id(delta) for _, deltas, _ in changes for delta in deltas)
        if key not in self._made:
            layers: dict[nn.Module, Mixed] = {}
            for places, deltas, columns in changes:
                for module, name in places:
                    layers.setdefault(module, {})[name] = (deltas, columns)
            self._made[key] = {
                module: partial(_forward_in_scope, self._owner, module, mixed)
                for module, mixed in layers.items()
            }
        return self._made[key]


def _forward_in_scope(owner: Conditioner, module: nn.Module, mixed: Mixed, x: Tensor) -> Tensor:
    return mixed_forward(module, mixed, owner.scope, x)


def mixed_forward(module: nn.Module, mixed: Mixed, scope: Scope, x: Tensor) -> Tensor:
    """What a layer computes where row b of its input meets its own parameters.

    Args:
        module: One that ``why_not_rows`` knows.
        mixed: Deltas and their columns of the coefficients, by the parameter's name.
        scope: Its coefficients, one for every row, and its cache.
        x: Shape (rows, ...).
    """
    coefficients = scope.coefficients
    assert coefficients is not None
    if len(x) != len(coefficients):
        raise ValueError(
            f"{len(coefficients)} preferences meet a layer input with {len(x)} rows, so rows and "
            f"preferences cannot be matched in {type(module).__name__} (a mixture-of-experts or "
            "flattened layer?). Use one preference per batch."
        )
    if isinstance(module, (nn.Linear, Conv1D)):
        return _linear(module, mixed, scope, x)
    if isinstance(module, nn.Embedding):
        out = F.embedding(x, module.weight, module.padding_idx)
        deltas, columns = mixed["weight"]
        for delta, column in zip(deltas, columns, strict=True):
            c = _shaped(coefficients[:, column], out.ndim).to(out)
            out = out + c * F.embedding(x, delta, module.padding_idx).to(out.dtype)
        return out * embedding_scale(module)
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


def embedding_scale(module: nn.Module) -> Tensor | float:
    """What a table is multiplied with: Gemma's by the root of the width, rounded as it is there."""
    scale: Tensor | float = getattr(module, "embed_scale", 1.0)
    weight: Any = module.weight
    return scale.to(weight.dtype) if isinstance(scale, Tensor) else scale


def _linear(module: Any, mixed: Mixed, scope: Scope, x: Tensor) -> Tensor:
    assert scope.coefficients is not None
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    if "weight" not in mixed:
        out = linear(x, weight)
    elif rows := _rows_worth_merging(scope, x):
        deltas, columns = mixed["weight"]
        if isinstance(module, Conv1D):
            deltas = [delta.T for delta in deltas]
        coefficients = scope.coefficients[::rows, columns].to(x.device)
        out = grouped_linear(x, weight, deltas, coefficients)
    else:
        out = _mixed(module, mixed["weight"], scope, x, weight)
    if module.bias is not None:
        out = out + _rows(module, "bias", mixed, scope.coefficients, x.ndim)
    return out


def _rows_worth_merging(scope: Scope, x: Tensor) -> int:
    """Rows of every group of equal coefficients, if many positions stand in each; otherwise 0."""
    assert scope.coefficients is not None
    if "rows" not in scope.cache:
        scope.cache["rows"] = _rows_alike(scope.coefficients)
    rows: int = scope.cache["rows"]
    positions = rows * x[0, ..., 0].numel()
    return rows if positions >= _WORTH_MERGING.get(x.device.type, _WORTH_ELSEWHERE) else 0


def _rows_alike(coefficients: Tensor) -> int:
    """Length of the runs of equal coefficients; 0 where they differ in length or are learned."""
    counts = coefficients.detach().unique_consecutive(dim=0, return_counts=True)[1]
    alike = bool((counts == counts[0]).all()) and not coefficients.requires_grad
    return int(counts[0]) if alike else 0


def _mixed(
    module: Any, mixed: tuple[list[Tensor], list[int]], scope: Scope, x: Tensor, weight: Tensor
) -> Tensor:
    """Inputs scaled per row and sets of weights stacked along the input: one product."""
    # Decoding calls a layer once a token; with gradients the stack is part of the graph.
    reuse = not torch.is_grad_enabled()
    stack = scope.cache.get(module) if reuse else None
    if stack is None:
        stack = _stack(weight, mixed, isinstance(module, Conv1D), scope)
        if reuse:
            scope.cache[module] = stack
    weight, factors = stack
    factors = factors.to(x).view(len(x), *[1] * (x.ndim - 2), -1, 1)
    return linear((x.unsqueeze(-2) * factors).flatten(-2), weight)  # (rows, ..., sets * in)


def _stack(
    weight: Tensor, mixed: tuple[list[Tensor], list[int]], transposed: bool, scope: Scope
) -> tuple[Tensor, Tensor]:
    """Weights, shape (out, sets * in), and what each row multiplies each with, (rows, sets).

    Where the coefficients of every row have the same sum s, ``W + sum_i c_i D_i`` is
    ``sum_i c_i (D_i + W / s)``, which is one product less.
    """
    assert scope.coefficients is not None
    deltas = [delta.T if transposed else delta for delta in mixed[0]]
    factors = scope.coefficients[:, mixed[1]]
    total = _common_sum(scope, factors, tuple(mixed[1]), weight.dtype)
    # A float32 delta would be lost in a bfloat16 sum.
    if total and all(delta.dtype == weight.dtype for delta in deltas):
        sets = [torch.add(delta, weight, alpha=1 / total) for delta in deltas]
    else:
        sets = [weight, *(delta.to(weight.dtype) for delta in deltas)]
        factors = torch.cat([torch.ones_like(factors[:, :1]), factors], -1)
    return torch.cat(sets, -1), factors


def _common_sum(
    scope: Scope, factors: Tensor, columns: tuple[int, ...], dtype: torch.dtype
) -> float:
    """Of the factors of every row, shape (rows, sets); 0 where they differ from row to row.

    To the rounding of ``dtype`` or float32, whichever is finer. Also 0 where the factors are
    learned, which must not see the sum, and where they cancel out by more than a half: to divide
    by little costs digits. Asked once a scope, because it waits for the device.
    """
    key = ("sum", columns, dtype)
    if key not in scope.cache:
        totals = factors.detach().double().sum(-1)
        # To a half-precision weight 0.95 and 0.93 would be alike.
        rtol = 4 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        alike = torch.allclose(totals, totals[:1], rtol=rtol, atol=0)
        cancels = bool((2 * totals.abs() < factors.detach().double().abs().sum(-1)).any())
        known = alike and not cancels and not factors.requires_grad
        scope.cache[key] = totals[0].item() if known else 0.0
    total: float = scope.cache[key]
    return total


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
