"""Decoding with the keys and values of a prompt stored once for all its responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from ..attempts import attempt
from .cache import grow_in_place, is_plain
from .policy import Policy
from .prefix import Prefix, accepted, extend, read_prompt

__all__ = ["Branches", "reading", "worth_branching"]

_NAME = "clp_branches"
# Shorter prompts are repeated: two products more a layer take longer. See benchmarks/generation.py.
_LONG = 128
# Models, and whether they say the same when responses share their prompts; asked once.
_SAME: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def worth_branching(policy: Policy, prefix: Prefix, rows: int) -> bool:
    """Whether ``rows`` responses shall share their prompts.

    The policy's ``share_prompts`` decides it where it is possible. Unset, it is left to the sizes,
    on the CPU, and to whether the model says the same.

    Args:
        policy: Its model must take its attention from Transformers' interface, and forget no token.
        prefix: The prompts.
        rows: Responses.
    """
    model, wish = policy.model, policy.share_prompts
    possible = (
        type(model)._supports_attention_backend
        and model.config._attn_implementation == "sdpa"
        and not model.config.is_encoder_decoder
        and bool(accepted(model, position_ids=None))
        and is_plain(prefix.cache)
        and not prefix.mask.is_meta
    )
    prompts, length = prefix.mask.shape
    pays = length >= _LONG and rows >= 2 * prompts and prefix.mask.device.type == "cpu"
    if wish is not None or not (possible and pays):
        return possible and bool(wish)
    if model not in _SAME:
        asked = attempt(lambda: _says_the_same(policy))  # an attention of its own may do anything
        _SAME[model] = asked.exception() is None and asked.result()
    return _SAME[model]


@torch.no_grad()
def _says_the_same(policy: Policy) -> bool:
    """Whether the model says of a few tokens what it says where every response has its prompt."""
    model = policy.model
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(18, device=model.device) % vocabulary
    prompt, more = ids[:10].view(2, 5), ids[10:].view(4, 2)
    mask = torch.arange(10, device=model.device).view(2, 5) > 0  # one begins a place later
    rows = torch.tensor([0, 0, 0, 1], device=model.device)
    none = torch.zeros_like(rows)
    # Not as the reference, which not every conditioner has; a session of its own forgets.
    with policy.conditioner.session():
        with policy.rows(none[:2]):
            prefix = read_prompt(model, prompt, mask)
        apart = prefix.copy().select(rows)
        prefix.cache = Branches(prefix.cache, prefix.mask)
        shared = prefix.select(rows)
        with policy.rows(none):
            for tokens in more.split(1, dim=1):
                expected = extend(model, apart, tokens)
                with reading(model, prefix.cache):
                    found = extend(model, shared, tokens)
    # To rounding: a fifth of what logits differ by in bfloat16, a ten-thousandth in float32.
    rounding = max(30 * torch.finfo(expected.dtype).eps, 1e-4)
    return bool(((found - expected).abs() <= rounding * expected.float().std()).all())


class Branches(Cache):
    """Keys and values of responses, each of which begins where its prompt ends.

    Begins with one empty response to every prompt; ``batch_select_indices`` repeats and drops them.

    Args:
        prompts: What reading the prompts left.
        mask: True where a token of them stands, shape (P, L).
    """

    def __init__(self, prompts: Cache, mask: Tensor) -> None:
        layers: list[Any] = prompts.layers
        self._prompts: list[tuple[Tensor, Tensor]] = [(x.keys, x.values) for x in layers]
        self._hidden = ~mask[:, None, None]
        self._prompt = torch.arange(len(mask), device=mask.device)  # of each response, (B,)
        for layer in layers:
            layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
        grow_in_place(prompts)
        super().__init__(layers=prompts.layers)
        self.attended = 0
        self._number()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Goes on with the responses at ``indices``, and with the prompts that they have."""
        super().batch_select_indices(indices)
        left, self._prompt = self._prompt[indices].unique(return_inverse=True)
        if len(left) < len(self._hidden):
            self._prompts = [(keys[left], values[left]) for keys, values in self._prompts]
            self._hidden = self._hidden[left]
        self._number()

    def _number(self) -> None:
        """Gives each response a place among those of its prompt: (P, most) places in all."""
        prompts = torch.arange(len(self._hidden), device=self._prompt.device)
        nth = (self._prompt[:, None] == prompts).cumsum(0).gather(1, self._prompt[:, None]) - 1
        self._most = int(nth.max()) + 1
        self._place = self._prompt * self._most + nth.squeeze(1)
        all_taken = len(self._place) == len(prompts) * self._most
        self._in_order = all_taken and bool((self._place.diff() == 1).all())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one token of every response to its prompt and to what it has said.

        Args:
            layer: Number of the model's layer.
            query: Shape (B, H * g, 1, d): g heads for every one of keys and values.
            key: Of the responses, shape (B, H, t, d).
            value: Likewise, shape (B, H, t, e).
            scale: Factor of the products.

        Returns:
            Shape (B, H * g, 1, e).
        """
        self.attended += 1
        keys, values = self._prompts[layer]
        length = keys.shape[-2]
        query = query.squeeze(2).unflatten(1, (keys.shape[1], -1)) * scale  # (B, H, g, d)
        of_prompt = (self._gathered(query) @ keys.mT).masked_fill(self._hidden, -torch.inf)
        scores = torch.cat([self._apart(of_prompt), query @ key.mT], dim=-1)
        share = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(value)
        said = share[..., length:] @ value
        out = self._apart(self._gathered(share[..., :length]) @ values) + said
        return out.flatten(1, 2).unsqueeze(2)

    def _gathered(self, x: Tensor) -> Tensor:
        """Of responses, shape (B, H, g, n), to that of prompts, (P, H, most * g, n)."""
        if not self._in_order:
            whole = x.new_zeros(len(self._hidden) * self._most, *x.shape[1:])
            whole[self._place] = x
            x = whole
        return x.unflatten(0, (-1, self._most)).transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor) -> Tensor:
        """The way back."""
        x = x.unflatten(2, (self._most, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._in_order else x[self._place]


@contextmanager
def reading(model: PreTrainedModel, cache: Branches) -> Iterator[None]:
    """Within it a forward of the model has its attention from ``cache``.

    Raises:
        ValueError: a layer did not, and so has not seen the prompts.
    """
    config = model.config.get_text_config()
    before, token = config._attn_implementation, _READ.set(cache)
    config._attn_implementation, cache.attended = _NAME, 0
    try:
        yield
        if cache.attended != len(cache.layers):
            raise ValueError(
                f"{type(model).__name__} has an attention of its own, with which responses cannot "
                "share a prompt's keys and values: set policy.share_prompts = False."
            )
    finally:
        config._attn_implementation = before
        _READ.reset(token)


_READ: ContextVar[Branches] = ContextVar("branches")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface; it makes no mask, because it knows no name for one."""
    options["attention_mask"] = attention_mask  # so it would be the model's own
    for name in ("attention_mask", "position_bias", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} has attention with {name}, with which responses cannot "
                "share a prompt's keys and values: set policy.share_prompts = False."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return _READ.get().attend(layer, query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)
