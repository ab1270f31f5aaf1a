from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clp_lightning.compare.permutation import permutation_test

POINT = torch.tensor([-10.0], dtype=torch.float64)


def one_point(rewards: list[float]) -> Tensor:
    """One run with one reward at one point, so that a hypervolume is a mean reward, + 10."""
    return torch.tensor(rewards, dtype=torch.float64).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # All of +-1 +-1 +-1: two of eight are as far from 0 as 3.
        ([1.0, 1.0, 1.0], 1 / 4),
        ([3.0, 1.0, -1.0], 3 / 4),  # +-5, +-3, +-3, +-1
        ([1.0, 1.0, -1.0], 1.0),  # +-3, +-1, +-1, +-1
    ],
)
def test_one_run_each_by_hand(differences: list[float], p: float) -> None:
    found = permutation_test(one_point(differences), one_point([0.0] * 3), POINT)
    assert found == pytest.approx(p, abs=0.05)


def test_several_runs_are_dealt_by_hand() -> None:
    # One prompt: 4 runs with 0, 0, 1, 1, two for each method. |difference of means| is 1 in two of
    # the six ways to choose the first two, 0 in four.
    low, high = (torch.full((2, 1, 1, 1), x, dtype=torch.float64) for x in (0.0, 1.0))
    assert permutation_test(low, high, POINT) == pytest.approx(1 / 3, abs=0.05)


def test_equal_and_different_methods() -> None:
    random = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 20, 5, 3, generator=random, dtype=torch.float64)
    point = torch.full((3,), -1.0, dtype=torch.float64)
    assert permutation_test(cells, cells.flip(0), point) == 1
    assert permutation_test(cells, cells + 2, point) == pytest.approx(1 / 1001)
    assert permutation_test(cells, cells + 2, point) == permutation_test(cells + 2, cells, point)
    cells[1, :, 2, 0] = float("nan")
    assert permutation_test(cells, cells, point) is None


def test_p_is_small_by_chance_no_more_often_than_it_says() -> None:
    random = torch.Generator().manual_seed(1)
    point = torch.full((2,), -1.0, dtype=torch.float64)
    small = 0
    for _ in range(60):
        difficulty = torch.randn(1, 12, 1, 2, generator=random, dtype=torch.float64)
        noise = torch.randn(3, 12, 4, 2, generator=random, dtype=torch.float64)
        cells = difficulty + noise
        p = permutation_test(cells[:2], cells[2:], point)
        assert p is not None
        small += p <= 0.1
    assert small <= 12  # 6 expected, deviation 2.3
