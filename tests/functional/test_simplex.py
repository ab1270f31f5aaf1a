from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clp_lightning.functional import (
    check_alpha,
    check_weights,
    parse_weights,
    sample_weights,
    simplex_grid,
    write_weights,
)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("num_rewards", [1, 3])
def test_sample_weights_has_one_shape(n: int, num_rewards: int) -> None:
    got = sample_weights(n, num_rewards=num_rewards)
    assert got.shape == (n, num_rewards)
    torch.testing.assert_close(got.sum(-1), torch.ones(n))


@pytest.mark.parametrize("concentration", [0.2, 1.0, 5.0])
def test_sample_weights_follows_the_dirichlet(concentration: float) -> None:
    # Dirichlet(c, c, c): mean 1/3, variance (1/3)(2/3) / (3c + 1).
    draws = sample_weights(
        40_000,
        num_rewards=3,
        concentration=concentration,
        generator=torch.Generator().manual_seed(0),
    )
    variance = 2 / 9 / (3 * concentration + 1)
    error = math.sqrt(variance / 40_000)
    assert (draws.mean(0) - 1 / 3).abs().max() < 4 * error
    torch.testing.assert_close(draws.var(0), torch.full((3,), variance), rtol=0.05, atol=0)


def test_tiny_concentration_gives_exact_corners_and_no_nan() -> None:
    draws = sample_weights(
        2_000, num_rewards=3, concentration=1e-6, generator=torch.Generator().manual_seed(0)
    )
    assert draws.isfinite().all()
    torch.testing.assert_close(draws.sum(-1), torch.ones(2_000))
    assert ((draws == 0) | (draws == 1)).float().mean() > 0.99
    assert (draws.mean(0) > 0.25).all()  # every corner gets its turn


def test_sample_weights_repeats_with_its_generator() -> None:
    one, two = (
        sample_weights(4, num_rewards=2, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(one, two)


def test_sample_weights_refuses_a_concentration_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="concentration must be positive, got 0"):
        sample_weights(1, num_rewards=2, concentration=0)


def test_simplex_grid_by_hand() -> None:
    want = [[2, 0, 0], [1, 1, 0], [1, 0, 1], [0, 2, 0], [0, 1, 1], [0, 0, 2]]
    assert (simplex_grid(3, 2) * 2).int().tolist() == want


@pytest.mark.parametrize(("num_rewards", "divisions"), [(1, 5), (2, 10), (3, 5), (4, 3)])
def test_simplex_grid_is_complete(num_rewards: int, divisions: int) -> None:
    grid = simplex_grid(num_rewards, divisions)
    assert len(grid) == math.comb(divisions + num_rewards - 1, num_rewards - 1)
    assert len(grid.unique(dim=0)) == len(grid)
    torch.testing.assert_close(grid.sum(-1), torch.ones(len(grid)))


@pytest.mark.parametrize(("num_rewards", "divisions"), [(0, 1), (2, 0)])
def test_simplex_grid_refuses(num_rewards: int, divisions: int) -> None:
    with pytest.raises(ValueError, match="num_rewards >= 1 and divisions >= 1"):
        simplex_grid(num_rewards, divisions)


def test_check_weights_orders_by_name_and_forgives_rounding() -> None:
    got = check_weights({"b": 0.333333, "a": 0.666666}, ["a", "b"])
    torch.testing.assert_close(got, torch.tensor([2 / 3, 1 / 3]))
    assert check_weights({"a": 1, "b": 0}, ["a", "b"]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "c": 0.5}, "unknown reward 'c'; the rewards are: a, b"),
        ({"a": 1.0}, "No weight for reward 'b'"),
        ({"a": 1.5, "b": -0.5}, "'b' must be 0 or more and finite, got -0.5"),
        ({"a": math.nan, "b": 1.0}, "'a' must be 0 or more and finite, got nan"),
        ({"a": math.inf, "b": 1.0}, "'a' must be 0 or more and finite, got inf"),
        ({"a": "0.5", "b": 0.5}, "'a' must be a number, got '0.5'"),
        ({"a": 0.5, "b": 0.4}, "must sum to 1, they sum to 0.9"),
    ],
)
def test_check_weights_names_what_is_wrong(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights, ["a", "b"])


@pytest.mark.parametrize("digits", [2, 4])
@pytest.mark.parametrize("shares", [[1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [2, 1], [5, 0, 1], [1]])
def test_written_weights_are_weights_again(shares: list[int], digits: int) -> None:
    weights = {f"r{i}": share / sum(shares) for i, share in enumerate(shares)}
    again = parse_weights(write_weights(weights, digits))
    check_weights(again, list(weights))
    for name, weight in weights.items():
        assert abs(again[name] - weight) <= len(shares) * 0.5 * 10**-digits


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "0.1", True])
def test_check_alpha_refuses(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha, the KL strength, must be a number in \[0, 1\]"):
        check_alpha(alpha)


def test_check_alpha_passes() -> None:
    assert [check_alpha(0), check_alpha(0.1), check_alpha(1)] == [0.0, 0.1, 1.0]


def test_numbers_of_numpy_pass() -> None:
    assert check_alpha(np.float32(0.5)) == 0.5 and type(check_alpha(np.int64(1))) is float
    half = np.float32(0.5)
    assert check_weights({"a": half, "b": half}, ["a", "b"]).tolist() == [0.5, 0.5]
