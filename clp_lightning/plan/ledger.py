"""Counts the memory of tensors that hold no data: a rehearsal on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Ledger", "fused_attention"]

REST = "activations"


class Ledger(TorchDispatchMode):
    """Adds up the storages of meta tensors that are alive, by part.

    A storage is counted from the operation that makes it until it is freed, so autograd, views,
    in-place operations and optimizers are accounted for as they are, whatever the model. What a
    kernel uses inside is not seen.

    Args:
        shares: Parts that are split over so many devices: a peak is one of a device.

    Attributes:
        now: Bytes alive, by part, over all devices.
    """

    def __init__(self, shares: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self._shares = shares or {}
        self.now: dict[str, int] = {}
        self._known: dict[int, tuple[str, int]] = {}
        self._part = REST
        self._highest: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0  # nothing is known: no shortcut
        if func is torch.ops.aten.equal.default and args[0].is_meta:
            return True  # asked of logits: whether they are the output layer's, as of most models
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._see(leaf, self._part)
        return out

    def _see(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = (part, storage.nbytes())
            self._add(part, storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        part, size = self._known.pop(key)
        self.now[part] -= size

    def _add(self, part: str, size: int) -> None:
        self.now[part] = self.now.get(part, 0) + size
        if self._on_a_device(self.now) > self._on_a_device(self._highest):
            self._highest = dict(self.now)

    def _on_a_device(self, parts: Mapping[str, int]) -> float:
        return sum(size / self._shares.get(part, 1) for part, size in parts.items())

    def assign(self, tensor: Tensor, part: str) -> None:
        """Counts ``tensor`` to ``part``, whether it is known or not."""
        self._see(tensor, part)
        key = tensor.untyped_storage()._cdata
        before, size = self._known[key]
        self._known[key] = (part, size)
        self.now[before] -= size
        self._add(part, size)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside the block belongs to ``name``."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def peak_of(self, function: Callable[[], Any]) -> dict[str, int]:
        """Bytes by part at the moment of ``function()`` when most are alive."""
        self._highest = dict(self.now)
        function()
        return self._highest


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention without a (T, T) matrix in memory inside the block, as fused kernels compute it.

    On the meta device torch would take the plain form, which keeps that matrix. Replaced by name,
    because the recomputation of a checkpoint runs outside of torch's function modes.
    """
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = partial(_attention, plain)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _attention(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
    mask = attn_mask
    if mask is not None and mask.requires_grad:  # fused kernels give it no gradient
        options = {"is_causal": is_causal, "scale": scale, **rest}
        return plain(query, key, value, attn_mask=mask, **options)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
    return out
