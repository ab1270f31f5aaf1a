"""The dial's measures on the policies whose dial is known: the optimum, and one that ignores it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clp_lightning.exact import ExactTask, exact_value, optimum
from clp_lightning.functional import (
    consistency,
    envy,
    predicted_gain,
    steering_gain,
    value_matrix,
)
from clp_lightning.types import Preference

TASK = ExactTask()
WEIGHTS = torch.tensor([[i / 10, 1 - i / 10] for i in range(11)], dtype=torch.float64)
GRID = Preference(WEIGHTS, torch.full((11,), 0.1, dtype=torch.float64))
BEST = optimum(TASK.chain_logp, TASK.rewards, GRID)[1]
START = exact_value(TASK.chain_logp.expand_as(BEST), TASK.chain_logp, TASK.rewards, GRID).mean()


def front(logp: Tensor) -> tuple[Tensor, Tensor]:
    """Mean rewards (G, K) and KL (G,) of policies (G, X, S)."""
    p = logp.exp()
    rewards = torch.einsum("gxs,xsk->gk", p, TASK.rewards) / TASK.num_contexts
    return rewards, (p * (logp - TASK.chain_logp)).sum(-1).mean(-1)


def test_the_optimum_steers_as_theory_says() -> None:
    rewards, kl = front(BEST)
    values = value_matrix(rewards, kl, preference=GRID)
    best = exact_value(BEST, TASK.chain_logp, TASK.rewards, GRID).mean(-1)
    torch.testing.assert_close(values.diagonal(), best)
    assert consistency(values).item() == pytest.approx(1)
    assert envy(values, best.mean() - START).item() == pytest.approx(0, abs=1e-9)
    # G = sum_k Cov_u(u_k, f_k); the KL does not count, as alpha does not vary.
    u, f = 0.9 * WEIGHTS, rewards
    covariance = ((u - u.mean(0)) * (f - f.mean(0))).mean(0).sum()
    torch.testing.assert_close(steering_gain(values), covariance)


def test_the_optimum_has_half_to_all_of_the_predicted_gain() -> None:
    rewards, kl = front(BEST)
    values = value_matrix(rewards, kl, preference=GRID)
    centred = (
        TASK.rewards - torch.einsum("xs,xsk->xk", TASK.chain_logp.exp(), TASK.rewards)[:, None]
    )
    covariance = torch.einsum("xs,xsk,xsl->kl", TASK.chain_logp.exp(), centred, centred) / 8
    natural = predicted_gain(GRID, covariance, values.diagonal().mean() - START)
    assert 0.5 < steering_gain(values) / natural < 1


def test_small_tilts_reach_the_predicted_gain() -> None:
    # alpha near 1: the optimum is the reference, tilted a little.
    grid = Preference(WEIGHTS, torch.full((11,), 0.999, dtype=torch.float64))
    logp = optimum(TASK.chain_logp, TASK.rewards, grid)[1]
    values = value_matrix(*front(logp), preference=grid)
    start = exact_value(TASK.chain_logp.expand_as(logp), TASK.chain_logp, TASK.rewards, grid).mean()
    centred = (
        TASK.rewards - torch.einsum("xs,xsk->xk", TASK.chain_logp.exp(), TASK.rewards)[:, None]
    )
    covariance = torch.einsum("xs,xsk,xsl->kl", TASK.chain_logp.exp(), centred, centred) / 8
    natural = predicted_gain(grid, covariance, values.diagonal().mean() - start)
    assert (steering_gain(values) / natural).item() == pytest.approx(1, abs=0.01)


def test_a_policy_that_ignores_the_dial_gains_nothing() -> None:
    rewards, kl = front(BEST[5:6].expand_as(BEST))
    values = value_matrix(rewards, kl, preference=GRID)
    assert steering_gain(values).item() == pytest.approx(0, abs=1e-12)


def test_a_reversed_dial_is_negative_and_inconsistent() -> None:
    rewards, kl = front(BEST.flip(0))
    values = value_matrix(rewards, kl, preference=GRID)
    assert steering_gain(values) < -0.1
    assert consistency(values) < 0.1
