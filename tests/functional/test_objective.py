from __future__ import annotations

import torch

from clp_lightning.functional import objective, scalarize
from clp_lightning.types import Preference

NAN = float("nan")
PREFERENCE = Preference(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([0.2, 0.5]))


def test_scalarize_by_hand() -> None:
    signals = torch.tensor([[4.0, 8.0, 1.0], [2.0, 100.0, 3.0]])
    # 0.8 * (1 + 6) - 0.2 * 1 = 5.4 and 0.5 * 2 - 0.5 * 3 = -0.5.
    got = scalarize(signals, preference=PREFERENCE)
    torch.testing.assert_close(got, torch.tensor([5.4, -0.5]))


def test_scalarize_treats_every_token_alike() -> None:
    signals = torch.randn(2, 5, 3)
    got = scalarize(signals, preference=PREFERENCE)
    assert got.shape == (2, 5)
    for t in range(5):
        torch.testing.assert_close(got[:, t], scalarize(signals[:, t], preference=PREFERENCE))


def test_one_reward_and_three() -> None:
    for k in (1, 3):
        preference = Preference(torch.full((2, k), 1 / k), torch.zeros(2))
        got = scalarize(torch.ones(2, k + 1), preference=preference)
        torch.testing.assert_close(got, torch.ones(2))


def test_a_reward_without_weight_does_not_poison() -> None:
    signals = torch.tensor([[NAN, 1.0, 0.0], [2.0, NAN, 0.0]])
    got = scalarize(signals, preference=PREFERENCE)
    assert got[0].isnan()  # weight 0.25 on a reward that was not scored
    assert got[1] == 1.0


def test_at_alpha_1_only_the_kl_counts() -> None:
    preference = Preference.single([0.5, 0.5], alpha=1.0)
    assert scalarize(torch.tensor([[NAN, 5.0, 2.0]]), preference=preference) == -2


def test_objective_by_hand() -> None:
    got = objective(
        torch.tensor([[4.0, 8.0], [2.0, 100.0]]), torch.tensor([1.0, 3.0]), preference=PREFERENCE
    )
    torch.testing.assert_close(got, torch.tensor([5.4, -0.5]))
