"""No bad answer of a reward passes unnoticed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clp_lightning.rewards import RewardBank, RewardError
from tests.rewards.rollouts import length, returning, rollout

nan = math.nan


def raising(completions: list[str], **_: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("score")
    return [1.0] * len(completions)


def short_of_one(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * (len(completions) - completions.count("bad"))


def changing(completions: list[str], **_: Any) -> list[float]:
    if "bad" in completions:
        completions[completions.index("bad")] = "better"
    return [1.0] * len(completions)


async def slow(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)


async def raising_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return raising(completions)


def leaving(completions: list[str], **_: Any) -> list[float]:
    if "bad" in completions:
        raise SystemExit(0)  # as argparse, click and others do
    return [1.0] * len(completions)


async def leaving_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return leaving(completions)


async def interrupting_later(completions: list[str], **_: Any) -> list[float]:
    if "bad" in completions:
        raise KeyboardInterrupt  # not from the keyboard: that reaches the main thread
    return [1.0] * len(completions)


def cancelled(completions: list[str], **_: Any) -> list[float]:
    if "bad" in completions:
        raise asyncio.CancelledError
    return [1.0] * len(completions)


def value_where_bad(value: Any) -> Callable[..., Any]:
    return lambda completions, **_: [value if c == "bad" else 1.0 for c in completions]


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, "raised KeyError: 'score'"),
    "raises later": (raising_later, "raised KeyError: 'score'"),
    "leaves": (leaving, "raised SystemExit: 0"),
    "leaves later": (leaving_later, "raised SystemExit: 0"),
    "interrupts later": (interrupting_later, "raised KeyboardInterrupt"),
    "cancelled": (cancelled, "raised CancelledError"),
    "pair": (value_where_bad(torch.ones(2)), "returned a Tensor that is no number"),
    "array": (value_where_bad(np.ones(2)), "returned a ndarray that is no number"),
    "no value": (value_where_bad(torch.ones((), device="meta")), "returned a Tensor that is no"),
    "complex": (value_where_bad(1j), "returned 1j, which is no number"),
    "nan": (value_where_bad(nan), "returned nan"),
    "infinity": (value_where_bad(-math.inf), "returned -inf"),
    "over float32": (value_where_bad(1e39), r"returned 1e\+39 .not finite in float32"),
    "over float": (value_where_bad(-(10**400)), "returned -inf .not finite in float32"),
    "string": (value_where_bad("1"), "returned '1', which is no number"),
    "list": (value_where_bad([1.0]), r"returned \[1.0\], which is no number"),
    "count": (short_of_one, "returned 2 scores for 3 completions"),
    "changes a list": (changing, "changed the list 'completions'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_reward_prompt_and_completion(fault: str) -> None:
    function, message = FAULTS[fault]
    bank = RewardBank({"fine": length, "faulty": function})
    with pytest.raises(
        RewardError, match=f"Reward 'faulty' {message}.*'prompt 1'.*Completion: 'bad'"
    ):
        bank(rollout(["good", "bad", "also good"]))


@pytest.mark.parametrize("fault", FAULTS)
def test_drop_leaves_out_the_response_and_counts_it(fault: str) -> None:
    function, _ = FAULTS[fault]
    bank = RewardBank({"fine": length, "faulty": function}, on_reward_error="drop")
    for count in (1, 2):
        scores = bank(rollout(["good", "bad", "also good"]))
        assert scores.kept.tolist() == [True, False, True]
        torch.testing.assert_close(
            scores.raw, torch.tensor([[4.0, 1], [3, nan], [9, 1]]), equal_nan=True
        )
        assert bank.dropped == count


def test_an_exit_stays_with_the_reward_that_makes_it() -> None:
    """The others of the process share its event loop."""
    bank = RewardBank({"leaves": leaving_later, "fine": slow}, on_reward_error="drop")
    assert bank(rollout(["bad", "good"])).kept.tolist() == [False, True]
    assert RewardBank({"fine": slow})(rollout(["a", "b"])).raw.tolist() == [[1], [1]]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_exit_in_time_is_no_exit(timeout: float | None) -> None:
    bank = RewardBank({"leaves": leaving}, reward_timeout=timeout)
    with pytest.raises(RewardError, match="'leaves' raised SystemExit: 0"):
        bank(rollout(["bad"]))


def test_the_users_interrupt_goes_through() -> None:
    def interrupted(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardBank({"r": interrupted}, on_reward_error="drop")(rollout(["a"]))


def test_a_list_that_cannot_be_read_is_a_fault() -> None:
    bank = RewardBank({"r": returning(torch.ones(2, device="meta"))})
    with pytest.raises(RewardError, match="Reward 'r' raised"):
        bank(rollout(["a", "b"]))


def test_a_fault_of_the_whole_batch_drops_all() -> None:
    bank = RewardBank({"faulty": returning("0.5")}, on_reward_error="drop")
    scores = bank(rollout(["a", "b"]))
    assert not scores.kept.any()
    assert scores.raw.isnan().all()
    with pytest.raises(RewardError, match="'faulty' returned a str, not a list"):
        RewardBank({"faulty": returning("0.5")})(rollout(["a", "b"]))


def test_a_reward_that_always_fails_says_why() -> None:
    bank = RewardBank({"fine": length, "faulty": raising}, on_reward_error="drop")
    raw = bank(rollout(["bad", "bad"])).raw
    with pytest.raises(ValueError, match="'faulty' scored none of 2 .*it raised KeyError: 'score'"):
        bank.fit(raw)
    bank = RewardBank({"silent": returning([None, None])})
    with pytest.raises(ValueError, match="it returned None each time"):
        bank.fit(bank(rollout(["a", "b"])).raw)


def test_text_methods_on_messages_get_a_hint() -> None:
    def upper(completions: list[str], **_: Any) -> list[float]:
        return [float(c.upper() == c) for c in completions]

    with pytest.raises(RewardError, match="AttributeError.*lists of messages here"):
        RewardBank({"upper": upper})(rollout(["A"], prompts=[[{"role": "user", "content": "?"}]]))


def test_what_is_left_after_a_drop_is_scored_together() -> None:
    def rank(completions: list[str], **_: Any) -> list[float]:
        raising(completions)
        return [float(sorted(completions).index(c)) for c in completions]

    scores = RewardBank({"rank": rank}, on_reward_error="drop")(rollout(["b", "bad", "a", "c"]))
    torch.testing.assert_close(scores.raw[:, 0], torch.tensor([1, nan, 0, 2]), equal_nan=True)


def test_changing_a_message_inside_is_seen_and_harms_nobody() -> None:
    batch = rollout(["bad"], prompts=[[{"role": "user", "content": "?"}]])

    def change(prompts: list[Any], **_: Any) -> list[float]:
        prompts[0][0]["content"] = "!"
        return [0.0]

    with pytest.raises(RewardError, match="changed the list 'prompts'"):
        RewardBank({"change": change})(batch)
    assert batch.prompts == [[{"role": "user", "content": "?"}]]
