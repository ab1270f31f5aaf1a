"""Who speaks for a response: one policy, or several whose log-probabilities are mixed."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Self

import torch
from torch import Tensor

from ..functional.logprobs import log_distribution
from .policy import Policy
from .prefix import read_prompt
from .steps import Steps

__all__ = ["Voices", "mixes_rows"]


def mixes_rows(policy: Policy) -> bool:
    """Whether one forward can answer for another preference in every row."""
    return policy.is_reference or policy.conditioner.why_not_rows() is None


class Voices:
    """The model's state after every running response, once for each of its v voices.

    Where the conditioner can mix rows, all voices stand in one batch; else each has a forward of
    its own. To be used in a ``with`` block.

    Args:
        policy: Answers for P * v preferences, the v voices of a prompt side by side.
        input_ids: Prompts, shape (P, L).
        prompt_mask: True where a token stands, shape (P, L).
        rows: Prompt of each response, shape (B,).
        share: Exponent of each voice in the geometric mixture, shape (P, v); None for one voice.
        steps: How the model computes.
    """

    def __init__(
        self,
        policy: Policy,
        input_ids: Tensor,
        prompt_mask: Tensor,
        rows: Tensor,
        share: Tensor | None,
        steps: Steps,
    ) -> None:
        self._policy, self._rows, self._share, self._steps = policy, rows, share, steps
        self._count = 1 if share is None else share.shape[1]
        every = torch.arange(self._count, device=rows.device)
        self._parts = [every] if mixes_rows(policy) else list(every.split(1))
        self._prefixes = []
        stem = policy.stem
        prompts = torch.arange(len(input_ids), device=rows.device)
        for part in self._parts:
            asked = _side_by_side(prompts, self._count, part)
            prompt = asked // self._count
            ids, mask = input_ids[prompt], prompt_mask[prompt]
            if stem is None:
                with steps.rows(policy, asked):
                    prefix = read_prompt(policy.model, ids, mask)
            else:
                prefix = stem.read_prompt(ids, mask, partial(_open, steps, policy, asked))
            self._prefixes.append(steps.begin(policy, prefix, _own(rows, part)))
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        # Where there is one forward its scope stays open: it keeps what decoding can reuse.
        if len(self._parts) == 1:
            asked = self._asked(self._parts[0])
            self._scope.enter_context(self._steps.rows(self._policy, asked))
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def _asked(self, part: Tensor) -> Tensor:
        return _side_by_side(self._rows, self._count, part)

    def logits(self) -> Tensor:
        """Logits of the next token of every running response, shape (B, V)."""
        if self._share is None:
            return self._prefixes[0].logits
        each = [log_distribution(prefix.logits) for prefix in self._prefixes]
        pairs = zip(each, self._parts, strict=True)
        voices = torch.cat([logp.unflatten(0, (-1, len(part))) for logp, part in pairs], dim=1)
        return (self._share[self._rows].to(voices).unsqueeze(-1) * voices).sum(1)

    def select(self, left: Tensor) -> None:
        """Goes on with the responses at ``left``, of those that are running."""
        pairs = zip(self._prefixes, self._parts, strict=True)
        self._prefixes = [prefix.select(_own(left, part)) for prefix, part in pairs]
        self._rows = self._rows[left]
        self._scope.close()
        self.__enter__()

    def extend(self, token: Tensor) -> None:
        """Appends one token to every running response, shape (B,)."""
        for prefix, part in zip(self._prefixes, self._parts, strict=True):
            alone = len(self._parts) > 1
            asked = self._asked(part)
            with self._steps.rows(self._policy, asked) if alone else nullcontext():
                tokens = token.repeat_interleave(len(part)).unsqueeze(-1)
                self._steps.extend(self._policy.model, prefix, tokens)


def _open(
    steps: Steps, policy: Policy, asked: Tensor, index: Tensor
) -> AbstractContextManager[None]:
    return steps.rows(policy, asked[index])


def _side_by_side(rows: Tensor, count: int, part: Tensor) -> Tensor:
    """Where some of each row's ``count`` voices stand."""
    return (rows.unsqueeze(-1) * count + part).flatten()


def _own(rows: Tensor, part: Tensor) -> Tensor:
    """The same within a batch that holds these voices only."""
    return _side_by_side(rows, len(part), torch.arange(len(part), device=rows.device))
