from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning.conditioning import LoRA
from clp_lightning.exact import (
    ExactTask,
    closed_gap,
    enumeration_rollout,
    exact_gradient,
    exact_logp,
    exact_reference_logp,
    exact_value,
)
from clp_lightning.policy import Policy
from clp_lightning.pretrained import Pretrained
from clp_lightning.types import Preference

PREFERENCES = Preference(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([0.1, 0.4]))


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "stop"])
def task(request: pytest.FixtureRequest) -> ExactTask:
    return ExactTask(stop=request.param, num_contexts=3)


@pytest.fixture(scope="module")
def policy(task: ExactTask, base_folder: Callable[[ExactTask], Path]) -> Policy:
    """A float64 LoRA policy, perturbed so that it is no longer the reference."""
    folder = base_folder(task)
    policy = Policy(Pretrained(str(folder), dtype="float64"), LoRA(rank=2, shared_rank=2))
    policy.build(["first", "second"])
    policy.double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return policy


def test_rollout_is_what_the_policy_would_be_asked(policy: Policy, task: ExactTask) -> None:
    rollout = enumeration_rollout(policy, task, PREFERENCES[:1], [2, 0])
    count = len(task.responses)
    assert len(rollout) == 2 * count
    assert rollout.columns["context"] == [2] * count + [0] * count
    assert torch.equal(rollout.input_ids[[0, -1]], task.contexts[[2, 0]])
    assert rollout.prompt_mask.all()
    assert torch.equal(rollout.response_ids[count:], task.responses)
    # Cut are the strings without a stop; of fixed length, none.
    assert rollout.truncated.sum() == (2 * 5**4 if task.stop else 0)


def test_probabilities_sum_to_one(policy: Policy, task: ExactTask) -> None:
    logp = exact_logp(policy, task, PREFERENCES)
    assert logp.shape == (2, 3, len(task.responses))
    ones = torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(logp.exp().sum(-1), ones)
    ref_logp = exact_reference_logp(policy, task)
    torch.testing.assert_close(ref_logp.exp().sum(-1), ones[0])
    assert ((logp.exp() * (logp - ref_logp)).sum(-1) > 1e-3).all()


def test_fresh_policy_closes_nothing(policy: Policy, task: ExactTask) -> None:
    fresh = Policy(policy.pretrained, LoRA(rank=2))
    fresh.build(["first", "second"])
    logp, ref_logp = exact_logp(fresh, task, PREFERENCES), exact_reference_logp(fresh, task)
    gap = closed_gap(logp, ref_logp, task.rewards, PREFERENCES)
    torch.testing.assert_close(gap, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("row", [0, 1])
def test_gradient_is_the_score_function_one(policy: Policy, task: ExactTask, row: int) -> None:
    # grad V = E_pi[ G(y) grad log pi(y) ] with G = (1 - alpha) w.R - alpha log(pi / pi_ref) held
    # fixed: the constant that the derivative of the log-ratio adds has mean 0 under pi.
    preference = PREFERENCES[row : row + 1]
    got = exact_gradient(policy, task, preference)
    w, alpha = preference.weights[0].double(), preference.alpha.double()
    ref_logp = exact_reference_logp(policy, task)
    surrogate = torch.zeros((), dtype=torch.float64)
    for context in range(task.num_contexts):
        rollout = enumeration_rollout(policy, task, preference, [context])
        with policy.conditioned(rollout.preference):
            logp = (policy.logprobs(rollout) * rollout.response_mask).sum(-1)
        returns = (1 - alpha) * (task.rewards[context] @ w)
        returns = returns - alpha * (logp.detach() - ref_logp[context])
        surrogate = surrogate + (logp.detach().exp() * returns * logp).sum() / 3
    trained = policy.trained_parameters()
    expected = torch.autograd.grad(surrogate, list(trained.values()))
    assert list(got) == list(trained)
    one, other = (torch.cat([g.flatten() for g in grads]) for grads in (got.values(), expected))
    assert (one - other).norm() < 1e-6 * other.norm()


def test_gradient_is_a_derivative_of_the_value(policy: Policy, task: ExactTask) -> None:
    # Central difference along the gradient: dV / dt = |grad V|^2.
    preference = PREFERENCES[:1]
    rewards = 2 * task.rewards - 1  # as if training normalised: not the task's own scale
    grads = exact_gradient(policy, task, preference, rewards)
    ref_logp = exact_reference_logp(policy, task)
    values, step = [], 1e-4
    for direction in (1, -2):  # one step up, two down, and back
        with torch.no_grad():
            for name, parameter in policy.trained_parameters().items():
                parameter += direction * step * grads[name]
        logp = exact_logp(policy, task, preference)
        values.append(exact_value(logp, ref_logp, rewards, preference).mean())
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            parameter += step * grads[name]
    slope = (values[0] - values[1]) / (2 * step)
    length = sum(g.square().sum() for g in grads.values())
    torch.testing.assert_close(slope, length, rtol=1e-4, atol=0)
