"""Full-rank deltas that lie beside the parameters they belong to, in the model's own modules.

What shards a model shards them along (FSDP2), and gathers them with their block. So a layer's
parameters are mixed when it is called: only then are they whole. Each device may answer for
preferences of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .base import Scope
from .forwards import forwards_replaced
from .rowwise import Mixed, Place, mixed_forward

__all__ = ["ADOPTED", "delta_name", "mix_at_home"]

ADOPTED = "_adopted_"
"""Begins the names of parameters that a conditioner has put into the model."""


def delta_name(name: str, column: int) -> str:
    """Of the delta of a parameter called ``name``, in the same module."""
    return f"{ADOPTED}{column}_{name}"


@contextmanager
def mix_at_home(
    places: Sequence[tuple[list[Place], list[int]]],
    scope: Scope,
    merge: Callable[[Tensor, list[Tensor], list[int]], Tensor],
) -> Iterator[None]:
    """Inside the block every layer mixes its parameters when it is called.

    Args:
        places: Of every conditioned parameter, the modules that hold it (the first has the
            deltas) and the columns of the coefficients.
        scope: Its coefficients.
        merge: A parameter, its deltas and their columns to the mixture.
    """
    layers: dict[nn.Module, dict[str, tuple[Place, list[int]]]] = {}
    for homes, columns in places:
        for module, name in homes:
            layers.setdefault(module, {})[name] = (homes[0], columns)
    forwards = {
        module: partial(_forward, module, module.forward, parts, scope, merge)
        for module, parts in layers.items()
    }
    with forwards_replaced(forwards):
        yield


def _forward(
    module: nn.Module,
    plain: Callable[..., Any],
    parts: dict[str, tuple[Place, list[int]]],
    scope: Scope,
    merge: Callable[[Tensor, list[Tensor], list[int]], Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    mixed: Mixed = {
        name: ([_parameter(home, delta_name(own, c)) for c in columns], columns)
        for name, ((home, own), columns) in parts.items()
    }
    assert scope.coefficients is not None
    if len(scope.coefficients) > 1:
        # No cache: it would keep gathered weights.
        return mixed_forward(module, mixed, Scope(scope.coefficients), *args)
    kept = {name: module._parameters[name] for name in mixed}
    for name, (deltas, columns) in mixed.items():
        home, own = parts[name][0]
        module._parameters[name] = merge(_parameter(home, own), deltas, columns)  # type: ignore[assignment]
    try:
        return plain(*args, **kwargs)
    finally:
        module._parameters.update(kept)


def _parameter(module: nn.Module, name: str) -> Tensor:
    found = module._parameters[name]
    assert found is not None
    return found
