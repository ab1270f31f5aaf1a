"""Evaluation as a tree against the plain enumeration: every response scored on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clp_lightning.conditioning import Conditioner, Gate, LoRA, Mixture, SoftPrompt
from clp_lightning.exact import (
    ExactPromptText,
    ExactTask,
    HardTask,
    enumeration_rollout,
    exact_logp,
    exact_reference_logp,
)
from clp_lightning.exact.tree import walk
from clp_lightning.policy import MOD, DeRa, Engine, Policy, TransformersEngine
from clp_lightning.pretrained import Pretrained
from clp_lightning.types import Preference

PREFERENCES = Preference(
    torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.2, 0.8]]), torch.tensor([0.1, 0.4, 0.3])
)
TASKS = {
    "fixed": ExactTask(num_contexts=3, length=3),
    "stop": ExactTask(num_contexts=3, length=3, stop=True),
}
CONDITIONERS: dict[str, Callable[[ExactTask], Conditioner]] = {
    "lora": lambda task: LoRA(rank=2, shared_rank=2),
    "gate": lambda task: LoRA(rank=2, coefficients=Gate()),
    "full": lambda task: Mixture(),
    "full-rows": lambda task: Mixture(mixing="row"),
    "attention": lambda task: Mixture("attention"),
    "logits": lambda task: Mixture("logits"),
    "soft-prompt": lambda task: SoftPrompt(),
    "prompt": lambda task: ExactPromptText(task),
}


def perturbed(folder: Path, conditioner: Conditioner, **options: object) -> Policy:
    """A policy that is far from the reference, in another direction for every reward."""
    policy = Policy(Pretrained(str(folder)), conditioner, **options)  # type: ignore[arg-type]
    policy.build(["first", "second"])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return policy


def plain_logp(
    policy: Policy, task: ExactTask, preference: Preference, engine: Engine | None = None
) -> Tensor:
    """Log-probability of every response, each computed from its first token on, (G, X, S)."""
    engine = engine or TransformersEngine()
    policy.share_prompts = False
    points = []
    for row in range(len(preference)):
        everything = range(task.num_contexts)
        rollout = enumeration_rollout(policy, task, preference[row : row + 1], everything)
        logp = engine.logprobs(policy, rollout).double().where(rollout.response_mask, 0)
        points.append(logp.sum(-1).unflatten(0, (task.num_contexts, -1)))
    return torch.stack(points)


@pytest.mark.parametrize("conditioner", CONDITIONERS)
@pytest.mark.parametrize("variant", TASKS)
def test_tree_is_the_enumeration(
    variant: str, conditioner: str, base_folder: Callable[[ExactTask], Path]
) -> None:
    task = TASKS[variant]
    policy = perturbed(base_folder(task), CONDITIONERS[conditioner](task))
    logp = exact_logp(policy, task, PREFERENCES)
    torch.testing.assert_close(logp, plain_logp(policy, task, PREFERENCES), rtol=0, atol=1e-5)
    ones = torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(logp.exp().sum(-1), ones, rtol=0, atol=1e-5)
    assert (logp[0] - logp[1]).abs().max() > 0.1  # they are different policies
    rollout = enumeration_rollout(policy, task, PREFERENCES[:1], range(3))
    with policy.reference():
        plain = policy.logprobs(rollout).double().where(rollout.response_mask, 0).sum(-1)
    torch.testing.assert_close(
        exact_reference_logp(policy, task), plain.unflatten(0, (3, -1)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("conditioner", ["full-rows", "lora", "attention"])
def test_tree_is_what_rows_answer(
    conditioner: str, base_folder: Callable[[ExactTask], Path]
) -> None:
    # A batch with another preference in every row, as in training.
    task = TASKS["fixed"]
    policy = perturbed(base_folder(task), CONDITIONERS[conditioner](task))
    count = len(task.responses)
    rollout = enumeration_rollout(policy, task, PREFERENCES[:1], range(2))
    rollout.preference = PREFERENCES[:2][torch.arange(2).repeat_interleave(count)]
    with torch.no_grad(), policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout).double().sum(-1).unflatten(0, (2, count))
    tree = exact_logp(policy, task, PREFERENCES[:2])
    torch.testing.assert_close(logp, tree[[0, 1], [0, 1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", [MOD(), DeRa(0.05)], ids=["mod", "dera"])
@pytest.mark.parametrize("conditioner", ["lora", "full"])
@pytest.mark.parametrize("variant", TASKS)
def test_tree_of_a_mixture_of_voices(
    variant: str, conditioner: str, engine: Engine, base_folder: Callable[[ExactTask], Path]
) -> None:
    task = TASKS[variant]
    policy = perturbed(base_folder(task), CONDITIONERS[conditioner](task))
    logp = exact_logp(policy, task, PREFERENCES, engine)
    torch.testing.assert_close(
        logp, plain_logp(policy, task, PREFERENCES, engine), rtol=0, atol=1e-5
    )
    assert (logp - exact_logp(policy, task, PREFERENCES)).abs().max() > 0.1


def test_tree_is_tempered_as_the_policy(base_folder: Callable[[ExactTask], Path]) -> None:
    task = TASKS["stop"]
    policy = perturbed(base_folder(task), LoRA(rank=2), temperature=1.5)
    torch.testing.assert_close(
        exact_logp(policy, task, PREFERENCES),
        plain_logp(policy, task, PREFERENCES),
        rtol=0,
        atol=1e-5,
    )


def test_contexts_computed_apart_are_the_same(
    base_folder: Callable[[ExactTask], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["stop"]
    policy = perturbed(base_folder(task), LoRA(rank=2))
    together = exact_logp(policy, task, PREFERENCES)
    monkeypatch.setattr("clp_lightning.exact.tree._MAX_ROWS", 1)
    torch.testing.assert_close(exact_logp(policy, task, PREFERENCES), together, rtol=0, atol=1e-5)


def test_tree_of_the_hard_level(base_folder: Callable[[ExactTask], Path]) -> None:
    task = HardTask(num_tokens=3, length=3, num_unseen=2)
    policy = perturbed(base_folder(task), Mixture(mixing="row"))
    assert walk(policy, task, None).shape == (9, 1 + 3 + 9, 3)
    torch.testing.assert_close(
        exact_logp(policy, task, PREFERENCES),
        plain_logp(policy, task, PREFERENCES),
        rtol=0,
        atol=1e-5,
    )
