from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning.functional import (
    consistency,
    cross_fitted_envy,
    dial_criteria,
    dial_passes,
    envy,
    has_dial,
    objective,
    predicted_gain,
    simplex_grid,
    steering_gain,
    value_matrix,
)
from clp_lightning.types import Preference

# One token, five outcomes, two rewards that conflict: everything can be summed up by hand.
REFERENCE = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor(
    [[2.0, -1.0], [1.0, 0.5], [0.0, 0.0], [-0.5, 1.0], [-1.5, 2.0]], dtype=torch.float64
)


def grid(*alphas: float) -> Preference:
    weights = simplex_grid(2, 10).double()
    alpha = torch.tensor(alphas, dtype=torch.float64).repeat_interleave(len(weights))
    return Preference(weights.repeat(len(alphas), 1), alpha)


def optimum(preference: Preference) -> tuple[Tensor, Tensor]:
    """Rewards (U, 2) and KL (U,) of pi* = pi_ref exp(w.R / beta) / Z."""
    beta = preference.alpha / (1 - preference.alpha)
    tilt = preference.weights @ REWARDS.T / beta.unsqueeze(-1)
    policy = (REFERENCE.log() + tilt).softmax(-1)
    return policy @ REWARDS, (policy * (policy.log() - REFERENCE.log())).sum(-1)


def covariance() -> Tensor:
    centred = REWARDS - REFERENCE @ REWARDS
    return centred.T @ (REFERENCE.unsqueeze(-1) * centred)


def value_gain(preference: Preference, values: Tensor) -> Tensor:
    at_reference = value_matrix(
        (REFERENCE @ REWARDS).unsqueeze(0), torch.zeros(1).double(), preference=preference
    )
    return values.diagonal().mean() - at_reference.mean()


@pytest.mark.parametrize("alphas", [(0.1,), (0.5,), (0.1, 0.3, 0.7)], ids=str)
def test_the_optimum_has_its_theoretical_values(alphas: tuple[float, ...]) -> None:
    preference = grid(*alphas)
    rewards, kl = optimum(preference)
    values = value_matrix(rewards, kl, preference=preference)
    torch.testing.assert_close(values.diagonal(), objective(rewards, kl, preference=preference))
    # V* = alpha log E_ref exp(w.R / beta) (docs/method.md, section 4).
    beta = preference.alpha / (1 - preference.alpha)
    tilt = preference.weights @ REWARDS.T / beta.unsqueeze(-1)
    best = preference.alpha * (REFERENCE.log() + tilt).logsumexp(-1)
    torch.testing.assert_close(values.diagonal(), best)

    gain = value_gain(preference, values)
    assert consistency(values).item() == pytest.approx(1, abs=1e-12)
    assert envy(values, gain).item() == pytest.approx(0, abs=1e-12)
    assert cross_fitted_envy(values, values, gain).item() == pytest.approx(0, abs=1e-12)
    predicted = predicted_gain(preference, covariance(), gain)
    assert 0.4 < steering_gain(values) / predicted < 1.05  # 0.44 where the tilts are large


def test_steering_gain_is_a_covariance() -> None:
    preference = grid(0.1, 0.4)
    rewards, kl = optimum(preference)
    alpha = preference.alpha.unsqueeze(-1)
    u = torch.cat([(1 - alpha) * preference.weights, alpha], -1)
    f = torch.cat([rewards, -kl.unsqueeze(-1)], -1)
    want = ((u - u.mean(0)) * (f - f.mean(0))).mean(0).sum()
    got = steering_gain(value_matrix(rewards, kl, preference=preference))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("alphas", [(0.995,), (0.99, 0.995)], ids=str)
def test_the_predicted_gain_is_exact_for_small_tilts(alphas: tuple[float, ...]) -> None:
    # V(f_lin) leaves out w.R of the reference: centre the rewards, as normalised ones are.
    preference = grid(*alphas)
    rewards, kl = optimum(preference)
    values = value_matrix(rewards - REFERENCE @ REWARDS, kl, preference=preference)
    gain = values.diagonal().mean()
    predicted = predicted_gain(preference, covariance(), gain)
    torch.testing.assert_close(steering_gain(values), predicted, rtol=0.02, atol=0)


def test_the_predicted_gain_with_one_alpha_is_the_closed_form() -> None:
    weights, c = grid(0.1).weights, covariance()
    centred = weights - weights.mean(0)
    spread = torch.trace(centred.T @ centred @ c) / len(weights)
    want = 2 * spread / (weights @ c * weights).sum(-1).mean() * 3
    for alpha in (0.0, 0.1, 1.0):  # it cancels
        torch.testing.assert_close(predicted_gain(grid(alpha), c, torch.tensor(3.0).double()), want)


def test_the_predicted_gain_of_several_alphas_with_a_0_is_undefined() -> None:
    assert predicted_gain(grid(0.0, 0.5), covariance(), torch.tensor(1.0).double()).isnan()


def test_a_constant_policy_gains_nothing() -> None:
    values = value_matrix(
        torch.tensor([[3.0, -1.0]]).expand(11, 2), torch.ones(11), preference=grid(0.1)
    )
    assert steering_gain(values).item() == pytest.approx(0, abs=1e-6)
    assert envy(values, torch.tensor(1.0)).item() == pytest.approx(0, abs=1e-6)


def test_a_reversed_dial() -> None:
    preference = grid(0.1)
    rewards, kl = optimum(preference)
    values = value_matrix(rewards.flip(0), kl.flip(0), preference=preference)
    assert steering_gain(values) < -0.1
    assert consistency(values).item() == pytest.approx(0, abs=1e-12)
    assert envy(values, value_gain(preference, values).abs()) > 0.5


def test_values_by_hand() -> None:
    preference = Preference(torch.eye(2), torch.tensor([0.5, 0.5]))
    rewards, kl = torch.tensor([[4.0, 0.0], [2.0, 6.0]]), torch.tensor([1.0, 2.0])
    values = value_matrix(rewards, kl, preference=preference)
    torch.testing.assert_close(values, torch.tensor([[1.5, 0.0], [-0.5, 2.0]]))
    # Own 1.75, all 0.75. The one pair: 1.5 + 2 - 0 + 0.5 = 4.
    assert steering_gain(values) == 1.0
    assert consistency(values) == 1.0


def test_consistency_weighs_pairs() -> None:
    # u = w = 0, 1/2, 1 on f = 0, 2, 1: pairs 1/2 * 2, 1/2 * -1, 1 * 1.
    u, f = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 2.0, 1.0])
    torch.testing.assert_close(consistency(u.outer(f)), torch.tensor(2.0 / 2.5))


def test_everything_is_batched_over_resamples() -> None:
    values = torch.randn(7, 4, 4)
    gain = torch.rand(7) + 1
    for batched, one in [
        (steering_gain(values), steering_gain(values[3])),
        (consistency(values), consistency(values[3])),
        (envy(values, gain), envy(values[3], gain[3])),
        (
            cross_fitted_envy(values, -values, gain),
            cross_fitted_envy(values[3], -values[3], gain[3]),
        ),
    ]:
        assert batched.shape == (7,)
        torch.testing.assert_close(batched[3], one)


def test_cross_fitting_takes_the_luck_out_of_envy() -> None:
    # A dial that does nothing, seen through noise: plain envy finds some, cross-fitted none.
    noise = torch.randn(2, 4_000, 9, 9, generator=torch.Generator().manual_seed(0))
    one = torch.ones(4_000)
    assert envy(noise[0], one).mean() > 1
    fitted = cross_fitted_envy(noise[0], noise[1], one)
    assert fitted.mean().abs() < 4 * fitted.std() / 4_000**0.5


def test_a_reward_that_was_not_scored_counts_only_where_it_has_weight() -> None:
    rewards = torch.tensor([[1.0, float("nan")]])
    values = value_matrix(
        rewards, torch.zeros(1), preference=Preference(torch.eye(2), torch.zeros(2))
    )
    assert values[0, 0] == 1.0
    assert values[1, 0].isnan()


def test_has_dial() -> None:
    assert has_dial(grid(0.1))
    assert has_dial(Preference(torch.ones(2, 1), torch.tensor([0.1, 0.2])))
    assert not has_dial(Preference(torch.ones(3, 1), torch.full((3,), 0.1)))


GOOD: dict[str, Any] = {
    "value_gain": {"mean": 0.5, "low": 0.1, "high": 0.9},
    "steering_gain": {"mean": 0.25, "low": 0.2, "high": 0.3, "predicted": 1.0},
    "consistency": {"mean": 1.0, "low": 0.95, "high": 1.0},
    "envy": {"mean": 0.05, "low": 0.0, "high": 0.2},
}


def test_a_dial_that_just_passes() -> None:
    assert dial_passes({"metrics": GOOD})


@pytest.mark.parametrize(
    ("criterion", "change"),
    [
        ("value_gain", {"low": 0.0}),
        ("value_gain", {"low": None}),
        ("steering_gain", {"low": 0.0}),
        ("steering_gain", {"mean": 0.24}),
        ("steering_gain", {"predicted": None}),
        ("consistency", {"low": 0.94}),
        ("consistency", {"mean": None, "low": None, "high": None}),
        ("envy", {"mean": 0.051}),
        ("envy", {"mean": None}),
    ],
)
def test_a_dial_fails_for_one_reason(criterion: str, change: dict[str, float | None]) -> None:
    metrics = GOOD | {criterion: GOOD[criterion] | change}
    want = dict.fromkeys(GOOD, True) | {criterion: False}
    assert dial_criteria(metrics) == want
    assert not dial_passes({"metrics": metrics})
