"""Every response of a task scored as a tree: what begins alike is computed once."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..functional.logprobs import log_distribution, masked_sum
from ..policy import Policy
from ..policy.prefix import extend, read_prompt
from ..types import Preference
from .task import ExactTask

__all__ = ["response_logp", "walk"]

# Rows that are computed at once: the caches of more do not fit the processor's.
_MAX_ROWS = 8192


def walk(policy: Policy, task: ExactTask, preference: Preference | None) -> Tensor:
    """Log-probabilities of the next token after every prefix of a response.

    Level by level with the cache of the level above, so a response costs a fraction of a token
    rather than all of its own. Gradients are recorded where they are enabled.

    Args:
        policy: The policy.
        task: The task that its base belongs to.
        preference: One row; None for the reference, which records no gradient.

    Returns:
        Shape (X, N, V), on the policy's device: N prefixes, the empty one first, then those of
        one token, and so on, in lexicographic order.
    """
    asked: Preference | None = None
    scope: AbstractContextManager[None] = policy.reference()
    if preference is not None:
        preference = preference.to(policy.model.device)
        asked, scope = (
            preference.repeat_interleave(task.num_contexts),
            policy.conditioned(preference),
        )
    input_ids, mask = policy.encode(task.prompts, asked)
    # A stop token has no children.
    letters = torch.arange(task.num_letters, device=input_ids.device)
    size = max(1, _MAX_ROWS // len(letters) ** (task.length - 1))
    with scope, policy.eval_mode():
        parts = [
            _walk(policy, ids, seen, letters, task.length)
            for ids, seen in zip(input_ids.split(size), mask.split(size), strict=True)
        ]
    return torch.cat(parts)


def _walk(policy: Policy, ids: Tensor, mask: Tensor, letters: Tensor, length: int) -> Tensor:
    """The same for some prompts, shape (P, N, V)."""
    rows = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    with policy.rows(rows):  # of one preference, whatever the number of rows
        prefix = read_prompt(policy.model, ids, mask)
        levels = [prefix.logits.unsqueeze(1)]
        for _ in range(length - 1):
            count = len(prefix.logits)
            parents = torch.arange(count, device=ids.device).repeat_interleave(len(letters))
            prefix = prefix.select(parents)
            logits = extend(policy.model, prefix, letters.repeat(count).unsqueeze(-1))
            levels.append(logits.reshape(len(ids), -1, logits.shape[-1]))
    return log_distribution(torch.cat(levels, dim=1), policy.temperature)


def response_logp(task: ExactTask, after: Tensor) -> Tensor:
    """Log-probability of every response.

    Args:
        task: The task.
        after: Of the next token after every prefix, as ``walk`` returns it, shape (X, N, V).

    Returns:
        Float64 on the CPU, shape (X, S).
    """
    before = torch.zeros(len(task.responses), dtype=torch.long)  # number within the level
    start = 0  # of the level
    nodes = []
    for position, token in enumerate(task.responses.unbind(-1)):
        nodes.append(start + before)
        # Behind a stop token the number means nothing, but must be one.
        before = before * task.num_letters + token.clamp(max=task.num_letters - 1)
        start += task.num_letters**position
    index = torch.stack(nodes, dim=-1)
    token_logp = after.cpu().double()[:, index, task.responses]  # (X, S, T)
    return masked_sum(token_logp, task.response_mask)
