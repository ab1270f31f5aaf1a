from __future__ import annotations

import pytest
import torch

from clp_lightning.metrics import Grid


def test_alpha_outside_weights_inside() -> None:
    got = Grid(divisions=1, alphas=[0.1, 0.5]).preferences(["a", "b"])
    assert got.weights.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    torch.testing.assert_close(got.alpha, torch.tensor([0.1, 0.1, 0.5, 0.5]))


def test_named_weights_replace_the_divisions() -> None:
    got = Grid(weights=[{"b": 1.0, "a": 0.0}, {"a": 0.5, "b": 0.5}]).preferences(["a", "b"])
    assert got.weights.tolist() == [[0, 1], [0.5, 0.5]]


def test_default_is_15_weightings_of_3_rewards() -> None:
    assert len(Grid().preferences(["a", "b", "c"])) == 15
    assert len(Grid().preferences(["a"])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divisions": 0}, "Grid.divisions must be at least 1, got 0"),
        ({"alphas": []}, "Grid.alphas is empty"),
        ({"alphas": [1.5]}, "alpha, the KL strength"),
        ({"alphas": 0.1}, r"list of KL strengths, such as \[0.1\]; got 0.1"),
        ({"weights": []}, "Grid.weights is empty"),
    ],
)
def test_bad_grids_are_refused(arguments: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("divisions", [1000, 10**15])
def test_more_weightings_than_can_be_measured_are_refused(divisions: int) -> None:
    assert len(Grid(divisions=1000).preferences(["a", "b"])) == 1001
    with pytest.raises(ValueError, match=rf"divisions={divisions} means .* of 3 rewards.*lower it"):
        Grid(divisions=divisions).preferences(["a", "b", "c"])


def test_weights_of_another_reward_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown reward 'c'"):
        Grid(weights=[{"a": 0.5, "c": 0.5}]).preferences(["a", "b"])
