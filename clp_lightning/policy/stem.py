"""The stem of a policy: the blocks below the lowest conditioned one, computed once for all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..conditioning import Conditioner
from ..conditioning.forwards import forwards_replaced
from ..types import Rollout, StemStates
from .blocks import blocks
from .cache import is_plain
from .prefix import Prefix, Rows, first_of_group, read_prompt

__all__ = ["Given", "Recording", "Stem"]

# Numbers that a rollout may carry; more memory than this is worth more than the time.
_MOST_NUMBERS = 2**28


class Stem:
    """The first blocks of a causal model, and all before them: no preference changes what they do.

    What they make of a token is the same for the policy and for the reference, and was computed
    when the token was sampled.

    Args:
        model: The model.
        number: How many of its blocks; at least 1.
    """

    def __init__(self, model: PreTrainedModel, number: int) -> None:
        stack = list(blocks(model))
        self._model, self._blocks, self._share = model, stack[:number], number / len(stack)

    @classmethod
    def of(cls, model: PreTrainedModel, conditioner: Conditioner) -> Stem | None:
        """The longest; None where there is none, or where it cannot be told."""
        changed, stack = conditioner.changed_layers(), list(blocks(model))
        if changed is None or model.config.is_encoder_decoder:
            return None
        cache = DynamicCache(config=model.config)
        if not is_plain(cache) or len(cache.layers) != len(stack):
            return None
        touched, output = set(changed), model.get_output_embeddings()
        inside = {module for block in stack for module in block.modules()}
        first = list(takewhile(lambda block: touched.isdisjoint(block.modules()), stack))
        # What lies outside the blocks may come before them, save the output layer.
        return cls(model, len(first)) if first and touched <= inside | {output} else None

    def __len__(self) -> int:
        return len(self._blocks)

    def hook(self, seen: Callable[[Any], None]) -> Any:
        """Calls ``seen`` with what the last block of the stem returns; a handle to remove it."""
        return self._blocks[-1].register_forward_hook(lambda *call: seen(call[-1]))

    def given(self, states: Tensor) -> AbstractContextManager[None]:
        """Within it a forward of the model takes ``states``, (rows, t, d), for the stem's."""
        last = len(self._blocks) - 1
        forwards = {
            block: partial(_skip, number, states if number == last else None)
            for number, block in enumerate(self._blocks)
        }
        return forwards_replaced(forwards)

    @torch.no_grad()
    def read_prompt(self, input_ids: Tensor, mask: Tensor, rows: Rows) -> Prefix:
        """As the function of that name, the stem once for prompts that are alike.

        Args:
            input_ids: Shape (P, L).
            mask: True where a token stands, shape (P, L).
            rows: Opens the preference.
        """
        model, every = self._model, torch.arange(len(mask), device=mask.device)
        read = torch.cat([input_ids, mask.long()], 1)
        which = read.unique(dim=0, return_inverse=True)[1]
        first = first_of_group(which)
        seen: list[Any] = []
        if 2 * len(first) <= self._share * len(mask):  # the first are read in whole, once more
            handle = self.hook(seen.append)
            try:
                with rows(first):
                    begun = read_prompt(model, input_ids[first], mask[first])
            finally:
                handle.remove()
        known = bool(seen) and isinstance(seen[-1], Tensor)
        with rows(every), self.given(seen[-1][which]) if known else nullcontext():
            prefix = read_prompt(model, input_ids, mask)
        if known:
            begun.cache.batch_select_indices(which)
            prefix.cache.layers[: len(self)] = begun.cache.layers[: len(self)]
        return prefix


def _skip(number: int, states: Tensor | None, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a block's forward; the cache gets tokens, from whose number masks are made."""
    for cache in [*args, *kwargs.values()]:
        if isinstance(cache, Cache):
            stub = hidden.new_zeros(1).expand(len(hidden), 1, hidden.shape[1], 1)
            cache.update(stub, stub, number)
    return hidden if states is None else states


class Recording:
    """Keeps what the stem makes of prompts and responses while they are sampled.

    To be used in a ``with`` block. Without a stem it keeps nothing.

    Args:
        stem: The policy's, or None.
        rows: Responses of the rollout.
        tokens: The most tokens of a prompt and its response together.
    """

    def __init__(self, stem: Stem | None, rows: int, tokens: int) -> None:
        self._stem, self._rows, self._tokens = stem, rows, tokens
        self._seen: list[Any] = []
        self._prompts: list[tuple[Tensor, Tensor]] = []
        self._told: dict[int, StemStates] = {}
        self._handle: Any = None

    def __enter__(self) -> Self:
        if self._stem is not None:
            self._handle = self._stem.hook(self._seen.append)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    @property
    def states(self) -> list[StemStates] | None:
        """Of every response, when all have ended; None without a stem."""
        return None if self._stem is None else [self._told[row] for row in range(self._rows)]

    def begins(self, ids: Tensor, mask: Tensor, rows: Tensor, new_tokens: int) -> None:
        """Prompts, shape (P, L), have been read; response b is to ``rows[b]``."""
        if self._stem is None:
            return
        read = self._seen[-1]  # the last forward is that of all prompts
        self._seen.clear()
        numbers = self._rows * self._tokens
        if not isinstance(read, Tensor) or numbers * read.shape[-1] > _MOST_NUMBERS:
            self.__exit__()
            self._stem = None
            return
        prompts = [(ids[row][each], read[row][each]) for row, each in enumerate(mask)]
        self._prompts = [prompts[row] for row in rows.tolist()]
        self._responses = read.new_zeros(len(rows), new_tokens, read.shape[-1])

    def extends(self, running: Tensor, step: int) -> None:
        """Token number ``step`` of the responses ``running`` has been read."""
        if self._stem is not None:
            self._responses[running, step] = self._seen.pop()[:, 0]

    def ended(self, number: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """The responses, (B, T) of ``lengths`` tokens each, are those at ``number`` of all."""
        if self._stem is None:
            return
        sizes = zip(number.tolist(), lengths.tolist(), strict=True)
        for row, (place, length) in enumerate(sizes):
            # A copy: else a few short responses would keep the memory of all.
            response = tokens[row, :length], self._responses[row, : length - 1].clone()
            self._told[place] = StemStates(self._stem, *self._prompts[row], *response)


class Given:
    """What the stem made of a rollout, for the forwards that score it; perhaps nothing.

    Args:
        stem: The policy's, or None.
        rollout: What is scored.
    """

    def __init__(self, stem: Stem | None, rollout: Rollout) -> None:
        self._states = rollout.stem or []
        self._stem = stem if self._states and self._tells_of(stem, rollout) else None

    def _tells_of(self, stem: Stem | None, rollout: Rollout) -> bool:
        """Whether ``stem`` read these very tokens; a rollout may have been given others."""
        if any(told.stem is not stem for told in self._states):
            return False
        prompts = torch.cat([told.prompt_ids for told in self._states])
        responses = torch.cat([told.response_ids for told in self._states])
        return torch.equal(prompts, rollout.input_ids[rollout.prompt_mask]) and torch.equal(
            responses, rollout.response_ids[rollout.response_mask]
        )

    def prompts(self, rows: Tensor, length: int) -> AbstractContextManager[None]:
        """Opened around a forward of the prompts of ``rows``, padded on the left to ``length``."""
        return self._open([self._states[row].prompt for row in self._of(rows)], length, left=True)

    def responses(self, rows: Tensor, length: int) -> AbstractContextManager[None]:
        """Opened around a forward of the first ``length`` tokens of the responses of ``rows``."""
        return self._open([self._states[row].response[:length] for row in self._of(rows)], length)

    def _of(self, rows: Tensor) -> list[int]:
        return [] if self._stem is None else rows.tolist()

    def _open(
        self, told: list[Tensor], length: int, left: bool = False
    ) -> AbstractContextManager[None]:
        if self._stem is None:
            return nullcontext()
        states = told[0].new_zeros(len(told), length, told[0].shape[-1])
        for wide, state in zip(states, told, strict=True):
            start = length - len(state) if left else 0
            wide[start : start + len(state)] = state
        return self._stem.given(states)
