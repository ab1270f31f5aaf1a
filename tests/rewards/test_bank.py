"""The bank: columns by name, statistics, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from clp_lightning.rewards import Brevity, Plain, RewardBank
from tests.rewards.rollouts import Own, length, returning, rollout

nan = math.nan


def test_one_reward_gives_one_column() -> None:
    assert RewardBank({"only": length})(rollout(["a", "bb", "ccc"])).raw.tolist() == [[1], [2], [3]]


def test_none_is_not_scored_and_numbers_of_other_libraries_count() -> None:
    bank = RewardBank(
        {
            "none": returning([None, 1]),
            "numpy": returning([np.float32(0.5), np.int64(2)]),
            "array": returning(np.array([1.0, 2.0])),
            "tensor": returning(torch.tensor([3.0, 4.0])),
            "bool": returning([True, False]),
        }
    )
    scores = bank(rollout(["a", "b"]))
    expected = torch.tensor([[nan, 0.5, 1, 3, 1], [1, 2, 2, 4, 0]])
    torch.testing.assert_close(scores.raw, expected, equal_nan=True)
    assert scores.kept.all()


def test_names() -> None:
    with pytest.raises(ValueError, match="no reward"):
        RewardBank({})
    for name in ("", "a/b", "a=1", "a,b", "a b"):
        with pytest.raises(ValueError, match="cannot be the name of a reward"):
            RewardBank({name: length})
    with pytest.raises(ValueError, match="'x' is a int"):
        RewardBank({"x": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="on_reward_error"):
        RewardBank({"x": length}, on_reward_error="ignore")  # type: ignore[arg-type]


def test_missing_columns_are_named() -> None:
    def needs_two(completions: Any, solution: Any, level: Any, hint: Any = 0, **_: Any) -> Any: ...

    bank = RewardBank({"fine": length, "sums": needs_two, "own": Own()})
    with pytest.raises(ValueError, match=r"'sums' needs the columns \['level'\].*document, solu"):
        bank.check_columns(["solution", "document"])
    bank.check_columns(["solution", "document", "level"])


def test_statistics_are_mean_and_floored_deviation() -> None:
    bank = RewardBank(
        {"a": length, "b": length, "c": length},
        statistics={"c": [2.0, 4.0]},
        std_floor={"b": 0.5},
    )
    assert not bank.fitted
    with pytest.raises(RuntimeError, match="no statistics yet"):
        bank.normalize(torch.zeros(1, 3))
    raw = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 0.0], [nan, 5.2, 0.0]])
    with pytest.warns(UserWarning, match="Reward 'b' hardly varies") as warned:
        bank.fit(raw)
    assert len(warned) == 1
    # a: 1 and 3, so 2 +- 1; b: its deviation 0.09 is under the floor; c: set by hand.
    torch.testing.assert_close(bank.mean, torch.tensor([2.0, 76 / 15, 2.0]))
    torch.testing.assert_close(bank.std, torch.tensor([1.0, 0.5, 4.0]))
    got = bank.normalize(torch.tensor([[4.0, 76 / 15, 10.0]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 0.0, 2.0]]))


def test_statistics_travel_in_the_state() -> None:
    bank = RewardBank({"a": length})
    bank.fit(torch.tensor([[1.0], [3.0]]))
    other = RewardBank({"a": length})
    other.load_state_dict(bank.state_dict())
    assert other.normalize(torch.tensor([[5.0]])).item() == 3.0
    assert RewardBank({"a": length}, statistics={"a": [0, 1]}).fitted


def test_the_floor_of_those_not_named_is_the_default() -> None:
    bank = RewardBank({"a": length, "b": length}, std_floor={"b": 0.5})
    assert bank.std_floor == {"a": 1e-3, "b": 0.5}
    assert RewardBank({"a": length}).std_floor == {"a": 1e-3}


def test_rewards_can_be_left_raw() -> None:
    bank = RewardBank({"a": length, "b": length}, statistics={"b": [1.0, 2.0]})
    bank.leave_raw()
    assert bank.normalize(torch.tensor([[5.0, 5.0]])).tolist() == [[5.0, 2.0]]


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"statistics names \['b'\]"):
        RewardBank({"a": length}, statistics={"b": [0, 1]})
    with pytest.raises(ValueError, match="deviation above 0"):
        RewardBank({"a": length}, statistics={"a": [0, 0]})
    with pytest.raises(ValueError, match="std_floor must be above 0"):
        RewardBank({"a": length}, std_floor=0.0)
    bank = RewardBank({"a": length, "b": length})
    with pytest.raises(ValueError, match="'b' scored none of 2"):
        bank.fit(torch.tensor([[1.0, nan], [2.0, nan]]))


def test_the_bank_has_no_parameters_and_only_statistics_in_its_state() -> None:
    bank = RewardBank({"short": Brevity(), "plain": Plain()})
    assert not list(bank.parameters())
    assert set(bank.state_dict()) == {"mean", "std", "fitted"}


def test_statistics_stay_exact_in_half_precision() -> None:
    bank = RewardBank({"length": length}, statistics={"length": (-5.2513, 0.9173)})
    exact = bank.mean.clone(), bank.std.clone()
    bank.to(torch.bfloat16)
    assert torch.equal(bank.mean, exact[0])
    assert torch.equal(bank.std, exact[1])
    assert bank.double().mean.dtype == torch.float64
