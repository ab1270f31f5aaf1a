"""A prompt computed once, to be continued by many responses.

The same three calls serve causal and encoder-decoder models, sampling and scoring:
``read_prompt`` runs the prompt, ``Prefix.select`` repeats its cache over the responses,
``extend`` runs response tokens on top of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .cache import select_rows, shallow_copy

__all__ = [
    "Prefix",
    "Rows",
    "extend",
    "first_of_group",
    "groups_alike",
    "positions",
    "read_prompt",
    "run",
    "run_encoder",
]

Rows = Callable[[Tensor], AbstractContextManager[None]]
"""Opens the preference for a batch whose rows are those at an index."""


@dataclass
class Prefix:
    """The state of a model after a prompt (and the response tokens that followed).

    Attributes:
        cache: Keys and values, one row per prompt or response.
        logits: Logits of the next token, shape (rows, V).
        mask: What attention may see: prompt and response so far for causal models, the
            encoder's input for encoder-decoder models, shape (rows, length).
        position: Position of the next token, shape (rows,).
        encoded: The encoder's output, shape (rows, L, d), or None for causal models.
        fixed: Whether cache and mask have their final length already.
        begun: Whether a token was read since the rows were chosen.
    """

    cache: Cache
    logits: Tensor
    mask: Tensor
    position: Tensor
    encoded: Tensor | None = None
    fixed: bool = False
    begun: bool = False

    def copy(self) -> Prefix:
        """The same, to be used up by itself."""
        return replace(self, cache=shallow_copy(self.cache))

    def select(self, rows: Tensor) -> Prefix:
        """The prefixes at ``rows``, which may repeat; uses up this one's cache."""
        select_rows(self.cache, rows)
        return Prefix(
            self.cache,
            self.logits[rows],
            self.mask[rows],
            self.position[rows],
            None if self.encoded is None else self.encoded[rows],
            self.fixed,
        )


def first_of_group(groups: Tensor) -> Tensor:
    """Row of the first response of every group, shape (G,).

    Example:
        >>> first_of_group(torch.tensor([0, 0, 1, 1, 1])).tolist()
        [0, 2]
    """
    count = int(groups.max()) + 1
    rows = torch.arange(len(groups), device=groups.device)
    start = torch.full((count,), len(groups), device=groups.device)
    return start.scatter_reduce(0, groups, rows, "amin")


def groups_alike(input_ids: Tensor, mask: Tensor) -> Tensor:
    """Which prompts are token for token the same: the number of each one's group, shape (P,).

    Example:
        >>> ids = torch.tensor([[7, 8], [0, 8], [7, 8]])
        >>> groups_alike(ids, ids > 0).tolist()
        [1, 0, 1]
    """
    return torch.cat([input_ids, mask.long()], 1).unique(dim=0, return_inverse=True)[1]


@memoize
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepted(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Those of ``options`` that the model's forward names."""
    names = _parameters(type(model).forward)
    return {name: value for name, value in options.items() if name in names}


def positions(mask: Tensor) -> Tensor:
    """Position of every token, counted over the mask, so that padding moves nothing.

    Example:
        >>> positions(torch.tensor([[False, True, True]])).tolist()
        [[0, 0, 1]]
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def run_encoder(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The encoder's output, shape (rows, L, d)."""
    # A sharded model gathers what is outside its blocks in methods of its own only.
    encode = getattr(model, "encode_whole", None) or model.get_encoder()
    encoded: Tensor = encode(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return encoded


def read_prompt(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Prefix:
    """Runs prompts, shape (rows, L) with their mask; the cache is on."""
    if model.config.is_encoder_decoder:
        encoded = run_encoder(model, input_ids, mask)
        start = input_ids.new_full((len(input_ids), 1), model.config.decoder_start_token_id)
        out = _decode(model, start, encoded, mask, None)
        return Prefix(out.cache, out.logits[:, -1], mask, mask.new_ones(len(mask)).long(), encoded)
    out = model(
        input_ids=input_ids,
        attention_mask=mask,
        use_cache=True,
        **accepted(model, position_ids=positions(mask), logits_to_keep=1),
    )
    return Prefix(out.cache, out.logits[:, -1], mask, mask.sum(-1))


def extend(
    model: PreTrainedModel,
    prefix: Prefix,
    tokens: Tensor,
    logits_of: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Runs response tokens, shape (rows, t), and moves ``prefix`` behind them.

    Args:
        model: That of the prefix.
        prefix: Where the responses are.
        tokens: The next of each.
        logits_of: Called with the model and the arguments of its forward; runs it if None.

    Returns:
        Logits after each token, shape (rows, t, V).
    """
    if prefix.encoded is not None:
        logits: Tensor = _decode(model, tokens, prefix.encoded, prefix.mask, prefix.cache).logits
    else:
        if not prefix.fixed:
            prefix.mask = torch.cat([prefix.mask, torch.ones_like(tokens, dtype=torch.bool)], -1)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        logits = (logits_of or run)(
            model,
            input_ids=tokens,
            attention_mask=prefix.mask,
            cache=prefix.cache,
            use_cache=True,
            **accepted(model, position_ids=prefix.position.unsqueeze(-1) + steps),
        )
    prefix.position = prefix.position + tokens.shape[1]
    prefix.logits = logits[:, -1]
    prefix.begun = True
    return logits


def run(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The logits of a forward, shape (rows, t, V)."""
    logits: Tensor = model(**inputs).logits
    return logits


def _decode(
    model: PreTrainedModel, tokens: Tensor, encoded: Tensor, mask: Tensor, cache: Cache | None
) -> Any:
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=mask,
        decoder_input_ids=tokens,
        cache=cache,
        use_cache=True,
    )
