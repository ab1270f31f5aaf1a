"""A policy evaluated exactly: log-probabilities of every response, V and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.logprobs import masked_sum
from ..policy import Engine, Policy, TransformersEngine
from ..types import Preference, Rollout
from .optimum import exact_value
from .task import ExactTask

__all__ = ["enumeration_rollout", "exact_gradient", "exact_logp", "exact_reference_logp"]


def enumeration_rollout(
    policy: Policy, task: ExactTask, preference: Preference, contexts: Sequence[int]
) -> Rollout:
    """Every response of ``contexts``, as if it had been sampled once.

    Args:
        policy: Encodes the prompts; the tensors are on its device.
        task: The task that its base belongs to.
        preference: One row, for all of them.
        contexts: Which contexts.

    Returns:
        len(contexts) * S responses, contexts outer; ``prompt_ids`` and the column ``context``
        name the context.
    """
    prompts = [task.prompts[x] for x in contexts]
    preference = preference.to(policy.model.device)
    input_ids, prompt_mask = policy.encode(prompts, preference.repeat_interleave(len(prompts)))
    plain_ids, plain_mask = policy.encode(prompts)
    device, times = input_ids.device, len(prompts)
    group = torch.arange(times, device=device).repeat_interleave(len(task.responses))
    context = torch.tensor(list(contexts), device=device)[group]
    mask = task.response_mask.to(device)
    words = [" ".join(task.tokens[i] for i in ids) for ids in task.response_index]
    cut = [task.stop and ids[-1] != task.stop_id for ids in task.response_index]
    return Rollout(
        prompts=[prompt for prompt in prompts for _ in words],
        prompt_ids=context,
        groups=group,
        sample=torch.arange(len(words), device=device).repeat(times),
        preference=preference.repeat_interleave(len(group)),
        input_ids=input_ids[group],
        prompt_mask=prompt_mask[group],
        response_ids=task.responses.to(device).repeat(times, 1),
        response_mask=mask.repeat(times, 1),
        completions=words * times,
        truncated=torch.tensor(cut, device=device).repeat(times),
        columns={"context": context.tolist()},
        reference_input_ids=plain_ids[group],
        reference_prompt_mask=plain_mask[group],
    )


def exact_logp(
    policy: Policy, task: ExactTask, preference: Preference, engine: Engine | None = None
) -> Tensor:
    """Log-probability of every response under every preference, without gradient.

    Args:
        policy: The policy, on any device.
        task: The task that its base belongs to.
        preference: G rows.
        engine: What answers: ``MOD()``, say; the policy itself if None.

    Returns:
        Float64 on the CPU, shape (G, X, S).
    """
    engine = engine or TransformersEngine()
    points = []
    for row in range(len(preference)):
        point = preference[row : row + 1]
        for x in range(task.num_contexts):
            rollout = enumeration_rollout(policy, task, point, [x])
            logp = engine.logprobs(policy, rollout).double()
            points.append(masked_sum(logp, rollout.response_mask).cpu())
    return torch.stack(points).unflatten(0, (len(preference), -1))


def exact_reference_logp(policy: Policy, task: ExactTask) -> Tensor:
    """The same under the reference, shape (X, S)."""
    return torch.stack([_reference_logp(policy, task, x) for x in range(task.num_contexts)])


def exact_gradient(
    policy: Policy, task: ExactTask, preference: Preference, rewards: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradient of V, mean over contexts, by enumeration.

    Args:
        policy: The policy; its trainable parameters are differentiated.
        task: The task that its base belongs to.
        preference: One row.
        rewards: What is maximised, shape (X, S, K); ``task.rewards`` by default. Give the
            normalised ones where training normalises.

    Returns:
        The gradient of every trainable parameter, by its name in ``policy``.
    """
    rewards = task.rewards if rewards is None else rewards
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for x in range(task.num_contexts):
        logp = _policy_logp(policy, task, preference, x)[None, None]
        ref_logp = _reference_logp(policy, task, x)[None]
        with torch.enable_grad():
            value = exact_value(logp, ref_logp, rewards[x : x + 1], preference).sum()
        grads = torch.autograd.grad(
            value / task.num_contexts, list(named.values()), materialize_grads=True
        )
        for name, grad in zip(named, grads, strict=True):
            total[name] += grad
    return total


def _policy_logp(policy: Policy, task: ExactTask, preference: Preference, context: int) -> Tensor:
    """Log-probability of every response of one context, with gradient, shape (S,)."""
    rollout = enumeration_rollout(policy, task, preference, [context])
    with torch.enable_grad(), policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    return masked_sum(logp.double(), rollout.response_mask).cpu()


def _reference_logp(policy: Policy, task: ExactTask, context: int) -> Tensor:
    # No preference reaches the reference, but a rollout has one.
    anything = Preference.single([1.0 / task.num_rewards] * task.num_rewards, 1.0)
    rollout = enumeration_rollout(policy, task, anything, [context])
    with policy.reference():
        logp = policy.logprobs(rollout)
    return masked_sum(logp.double(), rollout.response_mask).cpu()
