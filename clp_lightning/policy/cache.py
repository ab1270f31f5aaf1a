"""A cache of keys and values that grows in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

__all__ = ["grow_in_place", "make_full"]

_ROOM = 32  # tokens; so often is a layer copied, and so much memory may stand idle in every row


def grow_in_place(cache: Cache) -> None:
    """Keeps room behind the end of every layer: a new token is written, no old one is moved.

    Transformers' own cache copies all keys and values for every token of a response. Only where no
    gradient is recorded: autograd forbids writing into what it has seen. Layers that forget
    (sliding windows) stay as they are.
    """
    own = _own(cache)
    own.layers = [_Roomy(layer) if type(layer) is DynamicLayer else layer for layer in own.layers]


def make_full(cache: Cache, tokens: int) -> None:
    """A cache that grows in place as it is behind ``tokens`` more of every row, without values."""
    for layer in _own(cache).layers:
        if isinstance(layer, _Roomy):
            layer.make_full(tokens)


def _own(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class _Roomy(DynamicLayer):
    """A layer whose ``keys`` and ``values`` are the beginnings of longer tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(vars(layer))
        self._whole: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._whole or end > self._whole[0].shape[-2]:
            assert self.keys is not None and self.values is not None, "a prompt was read"
            self._whole = [_with_room(x, end + _ROOM) for x in (self.keys, self.values)]
        self.keys, self.values = (whole[..., :end, :] for whole in self._whole)
        self.keys[..., start:, :] = key_states
        self.values[..., start:, :] = value_states
        return self.keys, self.values

    def make_full(self, tokens: int) -> None:
        assert self.keys is not None and self.values is not None, "a prompt was read"
        end = self.get_seq_length() + tokens
        self._whole = [_with_room(x, end + _ROOM) for x in (self.keys, self.values)]
        self.keys, self.values = (whole[..., :end, :] for whole in self._whole)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._whole = []


def _with_room(states: Tensor, length: int) -> Tensor:
    """``states``, shape (rows, heads, t, d), at the beginning of a tensor of ``length`` tokens."""
    rows, heads, used, width = states.shape
    whole = states.new_empty(rows, heads, length, width)
    whole[..., :used, :] = states
    return whole
