"""Rewards are called as TRL calls them."""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

import pytest
import torch

from clp_lightning.rewards import Brevity, Function, RewardBank
from tests.rewards.rollouts import Own, length, rollout


async def slow_length(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return length(completions)


def times(completions: list[str], factor: float, **_: Any) -> list[float]:
    return [factor * len(completion) for completion in completions]


class Instance:
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return length(completions)


def test_every_kind_of_function_gives_its_column_by_name() -> None:
    bank = RewardBank(
        {
            "plain": length,
            "partial": functools.partial(times, factor=2.0),
            "instance": Instance(),
            "lambda": lambda completions, **_: [1] * len(completions),
            "async": slow_length,
            "path": "trl.rewards.think_format_reward",
            "kwargs": Function(times, {"factor": 3.0}),
            "own": Own(),
        }
    )
    batch = rollout(
        ["ab", "c"], prompts=[[{"role": "user", "content": "?"}]] * 2, document=["one", "a"]
    )
    # A conversation's completion is a list of one message, so its length is 1.
    scores = bank(batch)
    assert bank.names[0] == "plain"
    assert scores.raw.tolist() == [[1, 2, 1, 1, 1, 0, 3, 3], [1, 2, 1, 1, 1, 0, 3, 1]]
    assert scores.raw.dtype == torch.float32
    assert scores.kept.tolist() == [True, True]


def test_rewards_are_called_with_keywords_as_trl_does() -> None:
    seen: dict[str, Any] = {}

    def spy(*args: Any, **kwargs: Any) -> list[float]:
        assert not args
        seen.update(kwargs)
        kwargs["log_metric"]("share", 0.5)
        kwargs["log_metric"]("share", 1.0)
        kwargs["log_extra"]("note", ["x", "y"])
        return [0.0, 0.0]

    bank = RewardBank({"spy": spy})
    state = object()
    bank(rollout(["a", "b"], summary=["s", "t"]), trainer_state=state)
    assert seen["prompts"] == ["prompt 0", "prompt 1"]
    assert seen["completions"] == ["a", "b"]
    assert seen["completion_ids"] == [[0], [0, 1]]
    assert seen["summary"] == ["s", "t"]
    assert seen["trainer_state"] is state
    assert bank.metrics == {"share": 0.75}
    assert bank.extra == {"note": ["x", "y"]}
    bank(rollout(["a", "b"]))
    assert seen["trainer_state"].global_step == 0


def test_conversational_completions_are_messages() -> None:
    seen: list[Any] = []

    def spy(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0]

    RewardBank({"spy": spy})(rollout(["Yes."], prompts=[[{"role": "user", "content": "Well?"}]]))
    assert seen == [[{"role": "assistant", "content": "Yes."}]]


def test_async_rewards_run_side_by_side_in_one_loop() -> None:
    loops: list[Any] = []
    met = threading.Event()

    async def first(completions: list[str], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        for _step in range(500):  # waits for the second, so it must be running
            if met.is_set():
                return length(completions)
            await asyncio.sleep(0.01)
        raise TimeoutError

    async def second(completions: list[str], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        met.set()
        return length(completions)

    bank = RewardBank({"first": first, "second": second})
    assert bank(rollout(["abc"])).raw.tolist() == [[3, 3]]

    async def notebook() -> torch.Tensor:
        return bank(rollout(["abcd"])).raw

    assert asyncio.run(notebook()).tolist() == [[4, 4]]
    assert len(set(loops)) == 1


def test_functions_that_cannot_be_called_as_trl_does_are_refused_early() -> None:
    with pytest.raises(ValueError, match=r"must accept \*\*kwargs"):
        RewardBank({"x": lambda prompts, completions: [0.0]})
    with pytest.raises(ValueError, match="is a class"):
        RewardBank({"x": Brevity})
    with pytest.raises(ValueError, match="cannot be imported"):
        RewardBank({"x": "no_such_package.reward"})
    with pytest.raises(ValueError, match="has no 'no_such_reward'"):
        RewardBank({"x": "trl.rewards.no_such_reward"})
    with pytest.raises(ValueError, match="is not a function"):
        RewardBank({"x": "math.pi"})
