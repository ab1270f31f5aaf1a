"""The stem of a policy: the blocks below the lowest conditioned one, computed once for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..attempts import attempt
from ..conditioning import Conditioner
from ..conditioning.forwards import forwards_replaced
from ..types import Rollout, StemStates
from .blocks import blocks
from .cache import is_plain
from .prefix import Prefix, Rows, extend, first_of_group, groups_alike, read_prompt

__all__ = ["Given", "Recording", "Stem", "worth_keeping"]

# Numbers that a rollout may carry; more memory than this is worth more than the time.
_MOST_NUMBERS = 2**27
# Of all blocks, the share from which on prompts and responses are read apart for the stem's sake.
_WORTH_TWO_PARTS = 0.25


class Stem:
    """The first blocks of a causal model, and all before them: no preference changes what they do.

    What they make of a token is the same for the policy and for the reference, and was computed
    when the token was sampled. Which they are is asked once: change ``requires_grad`` before the
    first rollout, and no frozen weight between a rollout and its scoring.

    Args:
        model: The model.
        number: How many of its blocks; at least 1.

    Attributes:
        share: Of all blocks.
        key: Stands with all states that are this stem's.
    """

    def __init__(self, model: PreTrainedModel, number: int) -> None:
        stack = list(blocks(model))
        self._model, self._blocks, self._of_all = model, stack[:number], len(stack)
        self.share = number / len(stack)
        self.key = object()

    @classmethod
    def of(cls, model: PreTrainedModel, conditioner: Conditioner) -> Stem | None:
        """The longest; None where there is none, where it cannot be told, or does not do."""
        stem = cls.told(model, conditioner)
        if stem is None:
            return None
        with conditioner.session(), conditioner.reference():
            asked = attempt(stem._does)  # a model of another make may say anything to it
        return stem if asked.exception() is None and asked.result() else None

    @classmethod
    def told(cls, model: PreTrainedModel, conditioner: Conditioner) -> Stem | None:
        """The longest as far as the layers tell, without a forward of the model."""
        changed, stack = conditioner.changed_layers(), list(blocks(model))
        if changed is None or conditioner.rewrites or not _tells_all(conditioner):
            return None
        trained = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(False))]
        touched, output = {*changed, *trained}, model.get_output_embeddings()
        inside = {module for block in stack for module in block.modules()}
        first = list(takewhile(lambda block: touched.isdisjoint(block.modules()), stack))
        # What lies outside the blocks may come before them, save the output layer.
        after = set() if output is None else set(output.modules())
        if not first or model.config.is_encoder_decoder or not touched <= inside | after:
            return None
        return cls(model, len(first))

    @torch.no_grad()
    def _does(self) -> bool:
        """Whether the model says the same of a few tokens where the stem is not run."""
        model, seen = self._model, list[Any]()
        ids = torch.arange(10, device=model.device) % model.config.get_text_config().vocab_size
        prompt, more = ids[:6].view(2, 3), ids[6:].view(2, 2)
        mask = torch.arange(6, device=model.device).view(2, 3) > 0  # one begins a place later
        cache = DynamicCache(config=model.config)
        if not is_plain(cache) or len(cache.layers) != self._of_all:
            return False
        with self._seen(seen.append):
            prefix = read_prompt(model, prompt, mask)
            layers = prefix.copy().cache.layers
            expected = prefix.logits, extend(model, prefix, more)
        states, later = seen
        with self.given(states):
            again = read_prompt(model, prompt, mask)
        found, whole = again.logits, again.copy()
        whole.cache.layers[: len(self)] = layers[: len(self)]
        with self.given(later):
            skipped = extend(model, again, more)
        said = (found, expected[0]), (skipped, expected[1]), (extend(model, whole, more), skipped)
        return all(torch.equal(one, other) for one, other in said)

    def __len__(self) -> int:
        return len(self._blocks)

    def hook(self, seen: Callable[[Any], None]) -> Any:
        """Calls ``seen`` with what the last block of the stem returns; a handle to remove it."""
        return self._blocks[-1].register_forward_hook(lambda *call: seen(call[-1]))

    @contextmanager
    def _seen(self, seen: Callable[[Any], None]) -> Iterator[None]:
        handle = self.hook(seen)
        try:
            yield
        finally:
            handle.remove()

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
        which = groups_alike(input_ids, mask)
        first = first_of_group(which)
        seen: list[Tensor] = []
        if 2 * len(first) <= self.share * len(mask):  # the first are read in whole, once more
            with rows(first), self._seen(seen.append):
                begun = read_prompt(model, input_ids[first], mask[first])
        with rows(every), self.given(seen[0][which]) if seen else nullcontext():
            prefix = read_prompt(model, input_ids, mask)
        if seen:
            begun.cache.batch_select_indices(which)
            prefix.cache.layers[: len(self)] = begun.cache.layers[: len(self)]
        return prefix


def worth_keeping(tokens: int, width: int) -> bool:
    """Whether a rollout of so many tokens carries what the stem made of them, so wide."""
    return tokens * width <= _MOST_NUMBERS


def _skip(number: int, states: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a block's forward; the cache gets tokens, from whose number masks are made."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    for cache in [*args, *kwargs.values()]:
        if isinstance(cache, Cache):
            stub = hidden.new_zeros(1).expand(len(hidden), 1, hidden.shape[1], 1)
            cache.update(stub, stub, number)
    return hidden if states is None else states


def _tells_all(conditioner: Conditioner) -> bool:
    """Whether no subclass changes more of the model than the class that tells of its changes."""

    def owner(name: str) -> type:
        return next(kind for kind in type(conditioner).__mro__ if name in vars(kind))

    tells = owner("changed_layers")
    return all(
        owner(name) is tells or not issubclass(owner(name), tells)
        for name in ("attach", "open", "copies", "shared")
    )


class Recording:
    """Keeps what the stem makes of prompts and responses while they are sampled.

    To be used in a ``with`` block. Without a stem it keeps nothing.

    Args:
        stem: The policy's, or None.
        rows: Responses of the rollout.
        tokens: The most tokens of all prompts and responses together.
    """

    def __init__(self, stem: Stem | None, rows: int, tokens: int) -> None:
        self._stem, self._rows, self._numbers = stem, rows, tokens
        self._seen: list[Tensor] = []
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
        # The last forward of so many is that of all prompts. Several voices have more, blocks can
        # be replaced, and a model may have been asked something of a few tokens since.
        fitting = [states for states in self._seen if states.shape[:2] == ids.shape]
        self._seen.clear()
        read = fitting[-1] if fitting else None
        if read is None or not worth_keeping(self._numbers, read.shape[-1]):
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
            response = tokens[row, :length], self._responses[row, : length - 1]
            self._told[place] = StemStates(self._stem.key, *self._prompts[row], *response)


class Given:
    """What the stem made of a rollout, for the forwards that score it; perhaps nothing.

    Args:
        stem: The policy's, or None.
        rollout: What is scored.
        ids: The prompts that are read for it, shape (B, L).
        mask: True where a token of them stands, shape (B, L).
    """

    def __init__(self, stem: Stem | None, rollout: Rollout, ids: Tensor, mask: Tensor) -> None:
        self._states = rollout.stem or []
        known = stem is not None and all(told.key is stem.key for told in self._states)
        # A rollout may have been given other tokens, and the reference may read others.
        known &= _alike([told.prompt_ids for told in self._states], ids, mask)
        responses = [told.response_ids for told in self._states]
        known &= _alike(responses, rollout.response_ids, rollout.response_mask)
        self._stem = stem if known else None

    @property
    def pays(self) -> bool:
        """Whether it spares more than a pass in two parts costs."""
        return self._stem is not None and self._stem.share >= _WORTH_TWO_PARTS

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


def _alike(told: list[Tensor], ids: Tensor, mask: Tensor) -> bool:
    """Whether these are the tokens of every row; there are some."""
    return (
        bool(told)
        and [len(each) for each in told] == mask.sum(-1).tolist()
        and torch.equal(torch.cat(told), ids[mask])
    )
