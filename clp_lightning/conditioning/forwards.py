"""Layers that compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["forwards_replaced"]


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the block each of the layers has the forward that stands with it.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with forwards_replaced({layer: lambda x: x + 1}):
        ...     layer(1)
        2
        >>> "forward" in vars(layer)
        False
    """
    before = {layer: vars(layer).get("forward") for layer in forwards}
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                del layer.forward
            else:
                layer.forward = own
