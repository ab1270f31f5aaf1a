"""The exactly solvable task: so few responses that all of them can be listed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..described import Described
from ..keyed import generator

__all__ = ["ExactTask"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_RESPONSES = 100_000
# What a stream of random numbers is for; the second part of its key.
CONTEXTS, CHAIN, REWARDS = range(3)


@dataclass(frozen=True)
class ExactTask(Described):
    """A task whose optimum is known: every response of every context is enumerated.

    A context is a fixed prompt of two different tokens. The base is a model of one random Markov
    chain per context. A reward sums one random unary and one random adjacent-pair table per
    context over the response, and is standardised over all responses *of that context*, each
    counted once, so that every context and every reward weighs alike (a common factor of the
    tables cancels).

    With ``stop``, the last token of the vocabulary ends a response and counts in it; a response
    without it ends at ``length``. Either way the responses are what a sampler can return, so
    their probabilities sum to one. ``X`` counts contexts, ``S`` responses, ``V`` tokens.

    Args:
        task_seed: Draws contexts, chains, rewards and the base's weights.
        num_tokens: Size of the model's vocabulary, 2 to 26; the stop token is one of them.
        length: Number of tokens in a response, or with ``stop`` its upper limit.
        num_contexts: Number of prompts, at most the number of ordered pairs of different
            non-stop tokens.
        num_rewards: K.
        stop: Whether the last token ends a response.
        correlation: Of the first reward's tables with those of every other reward, in -1..1.
    """

    task_seed: int = 0
    num_tokens: int = 6
    length: int = 4
    num_contexts: int = 8
    num_rewards: int = 2
    stop: bool = False
    correlation: float = 0.0

    # Whether the base must count positions from the left, as a GPT-2 does.
    absolute_positions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task_seed < 0:
            raise ValueError(f"task_seed must be 0 or more, not {self.task_seed}.")
        if not 2 <= self.num_tokens <= len(LETTERS):
            raise ValueError(f"num_tokens must lie in 2..{len(LETTERS)}, not {self.num_tokens}.")
        if self.length < 1 or self.num_tokens**self.length > MAX_RESPONSES:
            raise ValueError(
                f"length {self.length} with {self.num_tokens} tokens gives no list of 1 to "
                f"{MAX_RESPONSES} responses; choose a smaller length of at least 1."
            )
        most = self.max_contexts
        if not 1 <= self.num_contexts <= most:
            raise ValueError(f"num_contexts must lie in 1..{most}, not {self.num_contexts}.")
        if self.num_rewards < 1:
            raise ValueError(f"num_rewards must be at least 1, not {self.num_rewards}.")
        if not -1 <= self.correlation <= 1:
            raise ValueError(f"correlation must lie in -1..1, not {self.correlation}.")

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def num_letters(self) -> int:
        """How many tokens may stand in a prompt, and go on with a response: all but the stop."""
        return self.num_tokens - self.stop

    @property
    def tokens(self) -> list[str]:
        """The vocabulary: one letter a token, position = id."""
        return list(LETTERS[: self.num_tokens])

    @property
    def stop_id(self) -> int | None:
        """Id of the token that ends a response, None for responses of fixed length."""
        return self.num_tokens - 1 if self.stop else None

    @property
    def pad_id(self) -> int:
        """Id of the padding: an ordinary token (the stop token where there is one).

        Nothing may tell padding by its id; masks do. This task finds code that does not.
        """
        return self.num_tokens - 1

    @property
    def max_contexts(self) -> int:
        """How many different prompts there are."""
        return self.num_letters * (self.num_letters - 1)

    @property
    def unseen(self) -> Tensor:
        """True for the contexts that no policy is trained on, shape (X,); here none."""
        return torch.zeros(self.num_contexts, dtype=torch.bool)

    @cached_property
    def contexts(self) -> Tensor:
        """Token ids of the prompts, all different, shape (X, L)."""
        # No token twice: a model with relative positions cannot count tokens that are all alike,
        # so after the prompt "e e" it could not tell the responses "e" and "e e" apart.
        pairs = torch.tensor(list(itertools.permutations(range(self.num_letters), 2)))
        order = torch.randperm(len(pairs), generator=self._generator(CONTEXTS))
        return pairs[order[: self.num_contexts]]

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as text, X strings."""
        return [" ".join(self.tokens[i] for i in row) for row in self.contexts.tolist()]

    @cached_property
    def response_index(self) -> dict[tuple[int, ...], int]:
        """Row of each response, by its token ids (without padding, the stop token included)."""
        cut = [
            ids[: ids.index(self.stop_id) + 1] if self.stop_id in ids else ids
            for ids in itertools.product(range(self.num_tokens), repeat=self.length)
        ]
        return {ids: row for row, ids in enumerate(dict.fromkeys(cut))}

    @cached_property
    def responses(self) -> Tensor:
        """Token ids of every response in lexicographic order, right-padded, shape (S, T)."""
        pad = (self.pad_id,) * self.length
        return torch.tensor([(ids + pad)[: self.length] for ids in self.response_index])

    @cached_property
    def response_mask(self) -> Tensor:
        """True where a token counts, shape (S, T)."""
        lengths = torch.tensor([len(ids) for ids in self.response_index])
        return torch.arange(self.length) < lengths[:, None]

    @cached_property
    def chain(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the first token, (X, V), and of a token after another, (X, V, V)."""
        draw = self._generator(CHAIN)
        first = torch.randn(self._table(), dtype=torch.float64, generator=draw)
        then = torch.randn(self._table(2), dtype=torch.float64, generator=draw)
        return first.log_softmax(-1), then.log_softmax(-1)

    @cached_property
    def chain_logp(self) -> Tensor:
        """Log-probability of every response under its context's chain, float64, shape (X, S)."""
        first, then = self.chain
        return first[:, self.responses[:, 0]] + self._sum_of_pairs(then)

    @cached_property
    def rewards(self) -> Tensor:
        """Every reward of every response, float64, shape (X, S, K)."""
        columns = []
        for total in self._raw_rewards():
            centred = total - total.mean(-1, keepdim=True)
            columns.append(centred / centred.square().mean(-1, keepdim=True).sqrt())
        return torch.stack(columns, dim=-1)

    def _raw_rewards(self) -> Iterator[Tensor]:
        """Each reward before it is standardised, shape (X, S)."""
        draw = self._generator(REWARDS)
        totals: list[Tensor] = []
        for _ in range(self.num_rewards):
            unary = torch.randn(self._table(), dtype=torch.float64, generator=draw)
            pair = torch.randn(self._table(2), dtype=torch.float64, generator=draw)
            totals.append(self._total(unary, pair))
        first, *others = totals
        yield first
        rest = (1 - self.correlation**2) ** 0.5
        yield from (self.correlation * first + rest * own for own in others)

    def rows(self, completion_ids: list[list[int]]) -> list[int]:
        """Rows of ``completion_ids`` in ``responses``.

        Raises:
            ValueError: for ids that are no response of this task.
        """
        for ids in completion_ids:
            if tuple(ids) not in self.response_index:
                raise ValueError(
                    f"{list(ids)} is no response of {self}: it must have {self.length} tokens"
                    + (" or end at the first stop token" if self.stop else "")
                    + f". Set max_new_tokens to {self.length} and use the base of this task."
                )
        return [self.response_index[tuple(ids)] for ids in completion_ids]

    def _generator(self, purpose: int) -> torch.Generator:
        return generator(self.task_seed, purpose)

    def _table(self, tokens: int = 1) -> tuple[int, ...]:
        return (self.num_contexts, *(self.num_tokens,) * tokens)

    def _total(self, unary: Tensor, pair: Tensor) -> Tensor:
        """Sum of two tables, (X, V) and (X, V, V), over every response, shape (X, S)."""
        singles = (unary[:, self.responses] * self.response_mask).sum(-1)
        return singles + self._sum_of_pairs(pair)

    def _sum_of_pairs(self, table: Tensor) -> Tensor:
        """Sum over a response's adjacent pairs of ``table`` (X, V, V), shape (X, S)."""
        pairs = table[:, self.responses[:, :-1], self.responses[:, 1:]]  # (X, S, T - 1)
        return (pairs * self.response_mask[:, 1:]).sum(-1)
