from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clp_lightning.exact import ExactTask, closed_gap, exact_value, optimum
from clp_lightning.types import Preference

GRID = Preference(
    torch.tensor([[i / 10, 1 - i / 10] for i in range(11)]).repeat(2, 1),
    torch.tensor([0.1] * 11 + [0.5] * 11),
)


def soft_bellman(
    task: ExactTask, context: int, rewards: dict[tuple[int, ...], float], alpha: float
) -> tuple[float, dict[tuple[int, ...], float]]:
    """V* and log pi* token by token: V(h) = alpha log sum_a pi_ref(a|h) exp(V(ha) / alpha).

    ``rewards`` are (1 - alpha) w.R of every response. The reference is the task's chain. Plain
    Python, and no formula in common with the library's.
    """
    first, then = (table[context].tolist() for table in task.chain)

    def solve(prefix: tuple[int, ...]) -> tuple[float, dict[tuple[int, ...], float]]:
        if prefix in rewards:
            return rewards[prefix], {prefix: 0.0}
        step = then[prefix[-1]] if prefix else first
        branches = [solve((*prefix, a)) for a in range(task.num_tokens)]
        scores = [step[a] + value / alpha for a, (value, _) in enumerate(branches)]
        peak = max(scores)
        norm = peak + math.log(sum(math.exp(s - peak) for s in scores))
        paths = {
            path: scores[a] - norm + logp
            for a, (_, below) in enumerate(branches)
            for path, logp in below.items()
        }
        return alpha * norm, paths

    return solve(())


def test_a_whole_return_has_no_noise_at_the_optimum() -> None:
    """(1 - alpha) w.R - alpha (log pi* - log pi_ref) is V* of its context for every response."""
    task = ExactTask(stop=True, num_contexts=2)
    preference = Preference.single([0.3, 0.7], 0.1)
    best, logp = optimum(task.chain_logp, task.rewards, preference)
    returns = 0.9 * task.rewards @ torch.tensor([0.3, 0.7]).double() - 0.1 * (
        logp[0] - task.chain_logp
    )
    torch.testing.assert_close(returns, best[0][:, None].expand_as(returns), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_closed_form_equals_soft_bellman(stop: bool, alpha: float) -> None:
    task = ExactTask(stop=stop, num_contexts=2)
    preference = Preference.single([0.3, 0.7], alpha)
    best, logp = optimum(task.chain_logp, task.rewards, preference)
    w, a = preference.weights[0].double(), preference.alpha.double().item()
    for context in range(2):
        reward = ((1 - a) * (task.rewards[context] @ w)).tolist()
        value, paths = soft_bellman(
            task, context, dict(zip(task.response_index, reward, strict=True)), a
        )
        assert best[0, context].item() == pytest.approx(value, abs=1e-10)
        expected = torch.tensor([paths[ids] for ids in task.response_index], dtype=torch.float64)
        torch.testing.assert_close(logp[0, context], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stop", [False, True])
def test_the_optimum_attains_its_value_and_nothing_near_it_more(stop: bool) -> None:
    task = ExactTask(stop=stop)
    best, logp = optimum(task.chain_logp, task.rewards, GRID)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(22, 8, dtype=torch.float64))
    value = exact_value(logp, task.chain_logp, task.rewards, GRID)
    torch.testing.assert_close(value, best, rtol=0, atol=1e-10)
    noise = torch.randn(logp.shape, dtype=logp.dtype, generator=torch.Generator().manual_seed(0))
    worse = (logp + 0.1 * noise).log_softmax(-1)
    assert (exact_value(worse, task.chain_logp, task.rewards, GRID) < best).all()


def test_value_by_hand() -> None:
    # pi = (3/4, 1/4), pi_ref = (1/2, 1/2), w.R = (1, 0), alpha = 1/5:
    # V = 4/5 * 3/4 - 1/5 * (3/4 log(3/2) + 1/4 log(1/2)).
    logp = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64).log()
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    value = exact_value(logp, half, rewards, Preference.single([1.0, 0.0], 0.2))
    expected = 0.6 - 0.2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert value.shape == (1, 1)
    assert value.item() == pytest.approx(expected, abs=1e-7)  # 0.2 is a float32


def test_closed_gap_is_0_for_the_reference_and_1_for_the_optimum() -> None:
    task = ExactTask()
    _, best = optimum(task.chain_logp, task.rewards, GRID)
    reference = task.chain_logp.expand_as(best)
    gap = closed_gap(reference, task.chain_logp, task.rewards, GRID)
    torch.testing.assert_close(gap, torch.zeros(22, dtype=torch.float64))
    gap = closed_gap(best, task.chain_logp, task.rewards, GRID)
    torch.testing.assert_close(gap, torch.ones(22, dtype=torch.float64))


def test_closed_gap_averages_contexts_before_it_divides() -> None:
    # The optimum in one context of two, the reference in the other; the shares of V* - V_ref
    # that the two contexts hold are 1/4 and 3/4 by construction of the rewards.
    half = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    preference = Preference.single([1.0], 0.5)
    gains = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rewards = torch.stack([torch.zeros(2, dtype=torch.float64), gains], dim=-1)[..., None]
    best, logp = optimum(half, rewards, preference)
    share = best[0] - 0.5 * rewards[:, :, 0].mean(-1)
    mixed = torch.stack([logp[0, 0], half[1]])[None]
    gap = closed_gap(mixed, half, rewards, preference)
    torch.testing.assert_close(gap, (share[0] / share.sum())[None])


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_closed_gap_refuses_an_alpha_that_it_cannot_judge(alpha: float) -> None:
    task = ExactTask(num_contexts=1)
    preference = Preference.single([0.5, 0.5], alpha)
    with pytest.raises(ValueError, match=r"alpha in \(0, 0.5\]"):
        closed_gap(task.chain_logp[None], task.chain_logp, task.rewards, preference)


def test_optimum_refuses_alpha_0() -> None:
    task = ExactTask(num_contexts=1)
    with pytest.raises(ValueError, match="above 0"):
        optimum(task.chain_logp, task.rewards, Preference.single([0.5, 0.5], 0.0))


def test_exact_value_is_differentiable() -> None:
    # dV / d log pi(y) = pi(y) (w.R - alpha (log-ratio + 1)): V by its definition.
    task = ExactTask(num_contexts=1)
    preference = Preference.single([0.3, 0.7], 0.25)
    logp: Tensor = task.chain_logp[None].clone().requires_grad_()
    exact_value(logp, task.chain_logp, task.rewards, preference).sum().backward()
    reward = 0.75 * (task.rewards[0] @ preference.weights[0].double())
    torch.testing.assert_close(logp.grad, (task.chain_logp[0].exp() * (reward - 0.25))[None, None])
