"""The layers of a transformer that come one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["blocks"]


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of the outermost lists of modules: the blocks of encoder and decoder.

    Example:
        >>> stack = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])), nn.Tanh()])
        >>> [type(block).__name__ for block in blocks(nn.Sequential(stack, nn.Linear(1, 1)))]
        ['Sequential', 'Tanh']
    """
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)
