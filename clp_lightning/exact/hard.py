"""The hard level: contexts that share their parts, some of them never trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .task import CHAIN, CONTEXTS, REWARDS, ExactTask

__all__ = ["HardTask"]

SPARSE = 0.1


@dataclass(frozen=True)
class HardTask(ExactTask):
    """An ``ExactTask`` on which one right method can be told from another.

    A context is any pair of tokens, equal ones too. The tables of its chain and of its rewards are
    sums of two parts, one for the token in the first place and one for the token in the second, so
    what is learnt of some pairs tells of the others. ``num_unseen`` pairs, chosen so that every
    token still stands in both places among the rest, are never trained on.

    The base is a GPT-2: a token and its absolute position are a sum in its embeddings, so the two
    parts are two vectors before the first layer. A Llama must first learn from the distance which
    of the two tokens is which, and instead keeps each pair for itself: with it half as much was
    learnt of the unseen pairs. Absolute positions also count tokens that are all alike.

    There are four rewards, each standardised per context like those of ``ExactTask``:

    0. random tables;
    1. correlated with the first: its tables are ``correlation`` times the first's plus fresh ones,
       of the same variance;
    2. opposed to it: the same with minus ``correlation``;
    3. sparse: 1 for the best tenth of the responses by a total of fresh tables, else 0.
       Standardised too, so that a weight means the same for all: then it is worth 3.3 to be in the
       best tenth, about as much as the way from the mean to the best of the others.

    Args:
        task_seed: Draws chains, rewards, the unseen pairs and the base's weights.
        num_tokens: Size of the model's vocabulary.
        length: Number of tokens in a response.
        correlation: Of the first reward's tables with the second's; minus that with the third's.
        num_unseen: How many of the num_tokens^2 contexts are never trained on.
    """

    length: int = 5
    num_contexts: int = field(init=False, repr=False, default=0)
    num_rewards: int = field(init=False, repr=False, default=4)
    stop: bool = field(init=False, repr=False, default=False)
    correlation: float = 0.7
    absolute_positions: ClassVar[bool] = True
    num_unseen: int = 9

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_contexts", self.num_tokens**2)
        super().__post_init__()
        most = self.num_tokens * (self.num_tokens - 1) // 2
        if not 0 <= self.num_unseen <= most:
            raise ValueError(f"num_unseen must lie in 0..{most}, not {self.num_unseen}.")

    @property
    def max_contexts(self) -> int:
        return self.num_tokens**2

    @cached_property
    def contexts(self) -> Tensor:
        """Token ids of the prompts, every pair in lexicographic order, shape (X, 2)."""
        return torch.tensor(list(itertools.product(range(self.num_tokens), repeat=2)))

    @cached_property
    def unseen(self) -> Tensor:
        """True for the contexts that no policy is trained on, shape (X,)."""
        draw = self._generator(CONTEXTS)
        while True:
            unseen = torch.zeros(self.num_contexts, dtype=torch.bool)
            unseen[torch.randperm(self.num_contexts, generator=draw)[: self.num_unseen]] = True
            seen = ~unseen.unflatten(0, (self.num_tokens, -1))  # first token, second token
            if seen.any(0).all() and seen.any(1).all():
                return unseen

    @cached_property
    def chain(self) -> tuple[Tensor, Tensor]:
        draw = self._generator(CHAIN)
        return self._tables(1, draw).log_softmax(-1), self._tables(2, draw).log_softmax(-1)

    def _raw_rewards(self) -> Iterator[Tensor]:
        draw = self._generator(REWARDS)
        fresh = [(self._tables(1, draw), self._tables(2, draw)) for _ in range(self.num_rewards)]
        first, second, opposed, sparse = fresh
        rest = (1 - self.correlation**2) ** 0.5
        yield self._total(*first)
        for tables, sign in ((second, 1), (opposed, -1)):
            pairs = zip(first, tables, strict=True)
            yield self._total(
                *(sign * self.correlation * shared + rest * own for shared, own in pairs)
            )
        total = self._total(*sparse)
        yield (total > total.quantile(1 - SPARSE, dim=-1, keepdim=True)).double()

    def _tables(self, tokens: int, draw: torch.Generator) -> Tensor:
        """A table over ``tokens`` tokens per context, entries of variance 1, shape (X, V, ...)."""
        shape = (self.num_tokens,) * (1 + tokens)
        first, second = (torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(2))
        return (first[:, None] + second[None]).flatten(0, 1) / 2**0.5
