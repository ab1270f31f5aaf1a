"""A policy evaluated exactly: log-probabilities of every response, V and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..policy import Engine, Policy, TransformersEngine
from ..types import Preference, Rollout
from .optimum import exact_value
from .task import ExactTask
from .tree import response_logp, walk

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
        engine: What answers: ``MOD()``, say; the policy itself if None, and where an engine does
            not say which voices it mixes.

    Returns:
        Float64 on the CPU, shape (G, X, S).
    """
    preference = preference.to(policy.model.device)
    voices, share = preference, None
    if isinstance(engine, TransformersEngine):
        voices, share = engine.voices(policy, preference)
    rows, which = torch.cat([voices.weights, voices.alpha[:, None]], -1).unique(
        dim=0, return_inverse=True
    )
    with torch.no_grad():
        spoken = [walk(policy, task, Preference(row[None, :-1], row[-1:])) for row in rows]
        points = []
        for point, own in enumerate(which.reshape(len(preference), -1).tolist()):
            after = spoken[own[0]]
            if share is not None:
                pairs = zip(share[point].tolist(), own, strict=True)
                after = sum(exponent * spoken[i] for exponent, i in pairs).log_softmax(-1)
            points.append(response_logp(task, after))
    return torch.stack(points)


def exact_reference_logp(policy: Policy, task: ExactTask) -> Tensor:
    """The same under the reference, shape (X, S)."""
    return response_logp(task, walk(policy, task, None))


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
    with torch.enable_grad():
        logp = response_logp(task, walk(policy, task, preference))
        ref_logp = exact_reference_logp(policy, task)
        value = exact_value(logp[None], ref_logp, rewards, preference).mean()
    grads = torch.autograd.grad(value, list(named.values()), materialize_grads=True)
    return dict(zip(named, grads, strict=True))
