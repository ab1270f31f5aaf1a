"""Caches of keys and values that are written in place, of growing or of fixed length."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from ..attempts import attempt

__all__ = [
    "fix_length",
    "grow_in_place",
    "is_plain",
    "is_recurrent",
    "make_full",
    "select_rows",
    "shallow_copy",
]

_ROOM = 32  # tokens; so often is a layer copied, and so much memory may stand idle in every row


def is_plain(cache: Cache) -> bool:
    """Whether every layer keeps the keys and values of all tokens, and nothing else."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some layer keeps a state that every token overwrites: a convolution, a recurrence."""
    if model.config.is_encoder_decoder:
        return False
    made = attempt(lambda: DynamicCache(config=model.config))  # a config may tell nothing of layers
    return made.exception() is None and _has_states(made.result())


def _has_states(cache: Cache) -> bool:
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _own(cache).layers)


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Goes on with ``rows``, which may repeat."""
    if _has_states(cache):
        cache.reorder_cache(rows)  # type: ignore[arg-type]
    else:
        cache.batch_select_indices(rows)


def grow_in_place(cache: Cache) -> None:
    """Keeps room behind the end of every layer: a new token is written, no old one is moved.

    Transformers' own cache copies all keys and values for every token of a response. Only where no
    gradient is recorded: autograd forbids writing into what it has seen. Layers that forget
    (sliding windows) stay as they are.
    """
    own = _own(cache)
    own.layers = [_Roomy(layer) if type(layer) is DynamicLayer else layer for layer in own.layers]


def fix_length(cache: Cache, length: int) -> None:
    """Makes every layer ``length`` tokens long, of which those behind its end are not yet written.

    Raises:
        ValueError: a layer forgets tokens (a sliding window) or keeps something else.
    """
    if not is_plain(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__})
        raise ValueError(
            f"The cache of this model has layers of no fixed length ({', '.join(kinds)}), so "
            "decoding cannot be compiled; use TransformersEngine(compile=False)."
        )
    layers: list[Any] = cache.layers
    cache.layers = [_Fixed(layer, length) for layer in layers]


def make_full(cache: Cache, tokens: int) -> None:
    """A cache that grows in place as it is behind ``tokens`` more of every row, without values."""
    for layer in _own(cache).layers:
        if isinstance(layer, _Roomy):
            layer.make_full(tokens)


def shallow_copy(cache: Cache) -> Cache:
    """The same keys and values in layers of their own, which can be selected from and extended.

    Not for layers that keep a state: it is overwritten, here and there.
    """
    copied: Any = copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        copied.self_attention_cache = shallow_copy(cache.self_attention_cache)
        copied.cross_attention_cache = shallow_copy(cache.cross_attention_cache)
        copied.is_updated = dict(cache.is_updated)
    else:
        copied.layers = [copy(layer) for layer in cache.layers]
    own: Cache = copied
    return own


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
        self.make_full(key_states.shape[-2])
        assert self.keys is not None and self.values is not None
        self.keys[..., -key_states.shape[-2] :, :] = key_states
        self.values[..., -key_states.shape[-2] :, :] = value_states
        return self.keys, self.values

    def make_full(self, tokens: int) -> None:
        """Goes behind ``tokens`` more, which are still to be written."""
        assert self.keys is not None and self.values is not None, "a prompt was read"
        end = self.get_seq_length() + tokens
        if not self._whole or end > self._whole[0].shape[-2]:
            self._whole = [_with_room(x, end + _ROOM) for x in (self.keys, self.values)]
        self.keys, self.values = (whole[..., :end, :] for whole in self._whole)

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.keys is not None and self.values is not None, "a prompt was read"
        self.keys, self.values = self.keys[indices], self.values[indices]
        self._whole = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


class _Fixed(StaticLayer):
    """Transformers' layer of fixed length, begun with what another has read.

    Where it ends is a tensor, so that a compiled program is the same for every token.
    """

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        super().__init__(length)
        assert layer.keys is not None and layer.values is not None, "a prompt was read"
        used = layer.get_seq_length()
        keys, values = (_with_room(x, length) for x in (layer.keys, layer.values))
        for states in (keys, values):
            states[..., used:, :] = 0  # attention multiplies them by 0, which must not give NaN
        self.keys, self.values, self.device = keys, values, keys.device
        self.cumulative_length = torch.tensor(used, device=self.device)
        self.is_initialized = True

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.keys is not None and self.values is not None, "a prompt was read"
        self.keys, self.values = self.keys[indices], self.values[indices]


def _with_room(states: Tensor, length: int) -> Tensor:
    """``states``, shape (rows, heads, t, d), at the beginning of a tensor of ``length`` tokens."""
    rows, heads, used, width = states.shape
    whole = states.new_empty(rows, heads, length, width)
    whole[..., :used, :] = states
    return whole
