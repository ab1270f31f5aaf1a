from __future__ import annotations

import moocore
import pytest
import torch

from clp_lightning.functional import (
    expected_utility,
    hypervolume,
    mean_inner_product,
    non_dominated,
    spearman,
)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_hypervolume_agrees_with_moocore_on_200_fronts(k: int) -> None:
    random = torch.Generator().manual_seed(k)
    for front in range(200):
        size = 1 + front % 20
        points = torch.randn(size, k, dtype=torch.float64, generator=random)
        if front % 3 == 0:  # ties and duplicates
            points = points.round(decimals=0)
        reference = torch.full((k,), -1.0, dtype=torch.float64)
        want = moocore.hypervolume(points.numpy(), ref=reference.numpy(), maximise=True)
        assert hypervolume(points, reference).item() == pytest.approx(want, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_hypervolumes_of_many_fronts_at_once(k: int) -> None:
    random = torch.Generator().manual_seed(k)
    points = torch.randn(3, 4, 7, k, generator=random, dtype=torch.float64).round(decimals=1)
    reference = torch.full((k,), -1.0, dtype=torch.float64)
    want = torch.stack([hypervolume(front, reference) for front in points.flatten(0, 1)])
    points[2, 3, 5, 0] = float("nan")
    want[-1] = float("nan")
    torch.testing.assert_close(
        hypervolume(points, reference), want.reshape(3, 4), equal_nan=True, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("k", [2, 3, 4])
def test_non_dominated_agrees_with_moocore(k: int) -> None:
    random = torch.Generator().manual_seed(k)
    for _ in range(50):
        points = torch.randn(15, k, dtype=torch.float64, generator=random).round(decimals=1)
        want = moocore.is_nondominated(points.numpy(), maximise=True, keep_weakly=True)
        assert non_dominated(points).tolist() == want.tolist()


def test_hypervolume_by_hand() -> None:
    # A 1 x 3 column and a 2 x 1 row above (-1, -1), sharing a 1 x 1 square.
    points = torch.tensor([[0.0, 2.0], [1.0, 0.0], [-2.0, 5.0]])
    assert hypervolume(points, torch.tensor([-1.0, -1.0])) == 4
    assert hypervolume(torch.tensor([[1.0], [3.0]]), torch.tensor([-1.0])) == 4
    assert hypervolume(torch.empty(0, 2), torch.zeros(2)) == 0
    assert hypervolume(torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(3)) == 0
    assert hypervolume(torch.full((1, 5), 2.0), torch.zeros(5)) == 32


def test_expected_utility_and_inner_product_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    rewards = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    # Best: 3, 1.5 (from the first), 2. Own: 3, 1, 2.
    torch.testing.assert_close(expected_utility(rewards, weights), torch.tensor(6.5 / 3))
    torch.testing.assert_close(mean_inner_product(rewards, weights), torch.tensor(2.0))


def test_spearman_with_ties_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 4, 2, 3, 1: covariance -4.5, squares 4.5 and 5.
    got = spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([9.0, 5.0, 6.0, 1.0]))
    torch.testing.assert_close(got, torch.tensor(-4.5 / (4.5 * 5) ** 0.5))
    assert spearman(torch.ones(3), torch.arange(3.0)).isnan()
    assert spearman(torch.arange(2.0), torch.tensor([1.0, float("nan")])).isnan()
