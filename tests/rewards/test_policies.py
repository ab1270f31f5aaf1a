"""What is promised of a reward that fails: asked again, given up in time, counted."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clp_lightning.rewards import RewardBank, RewardError, faults
from tests.rewards.rollouts import length, returning, rollout

pytestmark = pytest.mark.filterwarnings("ignore:Reward 'faulty':UserWarning")


class Flaky:
    """Fails at its first calls, each in the next of these ways; then gives 1.0 to everything."""

    def __init__(self, *ways: str) -> None:
        self.ways = list(ways)
        self.asked: list[list[str]] = []

    def __call__(self, completions: list[str], **_: Any) -> Any:
        self.asked.append(completions)
        scores: list[Any] = [1.0] * len(completions)
        match self.ways.pop(0) if self.ways else "":
            case "raise":
                raise ConnectionError("busy")
            case "nan":
                scores[-1] = math.nan
            case "exception":
                scores[-1] = ConnectionError("busy")
            case "short":
                scores.pop()
            case "slow":
                time.sleep(0.3)
        return scores


# -- asked again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_retry_heals_what_passes(on_error: Any) -> None:
    flaky = Flaky("raise", "short", "slow")
    bank = RewardBank(
        {"faulty": flaky},
        on_reward_error=on_error,
        reward_retries=3,
        reward_retry_wait=0.0,
        reward_timeout=0.1,
    )
    scores = bank(rollout(["a", "b"]))
    assert scores.raw.tolist() == [[1.0], [1.0]]
    assert scores.kept.all() and bank.dropped == 0 and len(flaky.asked) == 4


def test_only_the_responses_that_it_failed_on_are_asked_again() -> None:
    flaky = Flaky("exception", "nan")
    scores = RewardBank({"faulty": flaky}, reward_retries=2, reward_retry_wait=0.0)(
        rollout(["a", "b", "c"])
    )
    assert flaky.asked == [["a", "b", "c"], ["c"], ["c"]]
    assert scores.raw.tolist() == [[1.0]] * 3


def test_what_comes_after_the_last_try() -> None:
    bank = RewardBank({"faulty": Flaky(*["nan"] * 3)}, reward_retries=2, reward_retry_wait=0.0)
    with pytest.raises(
        RewardError, match=r"returned nan .*, 3 times in a row\. Prompt: 'prompt 1' Completion: 'b'"
    ):
        bank(rollout(["a", "b"]))
    bank = RewardBank(
        {"faulty": Flaky(*["nan"] * 3)},
        on_reward_error="drop",
        reward_retries=2,
        reward_retry_wait=0.0,
    )
    scores = bank(rollout(["a", "b"]))
    assert scores.kept.tolist() == [True, False] and bank.dropped == 1


def test_it_waits_twice_as_long_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", waited.append)
    RewardBank({"faulty": Flaky(*["raise"] * 3)}, reward_retries=3, reward_retry_wait=0.5)(
        rollout(["a"])
    )
    assert waited == [0.5, 1.0, 2.0]
    waited.clear()
    bank = RewardBank({"faulty": Flaky(*["raise"] * 1100)}, reward_retries=1100)
    bank(rollout(["a"]))  # 2 ** 1099 is no float
    assert waited[:8] == [1, 2, 4, 8, 16, 32, 60, 60] and set(waited[8:]) == {60.0}


@pytest.mark.parametrize("limit", [math.inf, 1e12, 1e300])
def test_a_limit_beyond_the_clock_is_none(limit: float) -> None:
    async def later(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return [1.0 for _ in completions]

    def slow(completions: list[str], **_: Any) -> list[float]:
        time.sleep(0.01)
        return [1.0 for _ in completions]

    bank = RewardBank({"slow": slow, "later": later}, reward_timeout=limit)
    assert bank(rollout(["a"])).raw.tolist() == [[1.0, 1.0]]


def test_the_first_fault_that_is_survived_is_told_once() -> None:
    bank = RewardBank({"faulty": Flaky(*["nan"] * 3)}, on_reward_error="drop")
    batch = rollout(["a", "b"])
    with pytest.warns(UserWarning, match="'faulty' returned nan.*loses the resp.*bias"):
        bank(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bank(batch).kept.tolist() == [True, False]


# -- a limit to its time -------------------------------------------------------------------------


def hanging(completions: list[str], **_: Any) -> list[float]:
    time.sleep(5)
    return [0.0] * len(completions)


async def hanging_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(5)
    return [0.0] * len(completions)


@pytest.mark.parametrize("reward", [hanging, hanging_later])
def test_a_reward_that_hangs_is_given_up(reward: Callable[..., Any]) -> None:
    batch = rollout(["a", "b"])
    begun = time.monotonic()
    with pytest.raises(
        RewardError, match=r"'faulty' did not answer within 0\.1 s\. Prompt: 'prompt 0' Comp"
    ):
        RewardBank({"faulty": reward}, reward_timeout=0.1)(batch)
    bank = RewardBank(
        {"fine": length, "faulty": reward}, on_reward_error="drop", reward_timeout=0.1
    )
    assert not bank(batch).kept.any() and bank.dropped == 2
    assert time.monotonic() - begun < 3


def test_a_late_response_ends_the_search_for_the_faulty_one() -> None:
    calls = []

    def worse(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        if len(completions) > 1:
            raise ConnectionError("busy")
        return hanging(completions)

    begun = time.monotonic()
    with pytest.raises(RewardError, match="raised ConnectionError"):
        RewardBank({"faulty": worse}, reward_timeout=0.1)(rollout(["a", "b", "c"]))
    bank = RewardBank({"faulty": worse}, on_reward_error="drop", reward_timeout=0.1)
    assert not bank(rollout(["a", "b", "c"])).kept.any()
    assert calls == [["a", "b", "c"], ["a"]] * 2
    assert time.monotonic() - begun < 3


def test_within_the_limit_all_is_as_without_it() -> None:
    async def soon(completions: list[str], **_: Any) -> list[float]:
        return length(completions)

    def strict(completions: list[str], **_: Any) -> list[float]:
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cpu") == torch.float16
        return length(completions)

    def timed_out(**_: Any) -> list[float]:
        raise TimeoutError("its own")

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        bank = RewardBank({"sync": strict, "async": soon}, reward_timeout=30.0)
        assert bank(rollout(["a", "bb"])).raw.tolist() == [[1, 1], [2, 2]]
    with pytest.raises(RewardError, match="raised TimeoutError: its own"):
        RewardBank({"faulty": timed_out}, reward_timeout=30.0)(rollout(["a"]))


def test_a_hanging_thread_does_not_keep_the_process() -> None:
    code = (
        "import threading\n"
        "from clp_lightning.rewards import RewardBank\n"
        "from tests.rewards.rollouts import rollout\n"
        "bank = RewardBank({'faulty': lambda **_: threading.Event().wait()}, reward_timeout=0.1)\n"
        "bank(rollout(['a']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("Reward 'faulty' did not answer within 0.1 s") == 1


# -- nothing is lost -----------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "ok": 1.0,
    "none": None,
    "nan": math.nan,
    "inf": -math.inf,
    "text": "1",
    "exception": KeyError("score"),
}


class Planned:
    """What it does with a response stands in the response; its first calls fail as a whole."""

    def __init__(self, ways: list[str]) -> None:
        self.flaky = Flaky(*ways)

    def __call__(self, completions: list[str], **_: Any) -> Any:
        scores = self.flaky(completions)
        if "raise" in completions:
            raise KeyError("score")
        return [VALUES[c] for c, _ in zip(completions, scores, strict=False)]


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.sampled_from(["raise", *VALUES]), min_size=1, max_size=6),
    ways=st.lists(st.sampled_from(["raise", "short"]), max_size=3),
    retries=st.integers(0, 3),
    on_error=st.sampled_from(["raise", "drop"]),
)
def test_kept_and_dropped_are_all(
    rows: list[str], ways: list[str], retries: int, on_error: Any
) -> None:
    rewards = {"fine": returning([0.0] * len(rows)), "faulty": Planned(ways)}
    bank = RewardBank(
        rewards, on_reward_error=on_error, reward_retries=retries, reward_retry_wait=0.0
    )
    good = [row in ("ok", "none") for row in rows]
    try:
        scores = bank(rollout(rows))
    except RewardError:
        assert on_error == "raise" and not (all(good) and len(ways) <= retries)
        return
    assert int(scores.kept.sum()) + bank.dropped == len(rows)
    column = scores.raw[:, 1]
    for row, kept, score in zip(rows, scores.kept.tolist(), column.tolist(), strict=True):
        assert kept <= (row in ("ok", "none"))
        assert score == 1.0 if kept and row == "ok" else math.isnan(score)
    if len(ways) <= retries:
        assert scores.kept.tolist() == good


def test_arguments_out_of_range() -> None:
    for wrong, message in [
        ({"on_reward_error": "retry"}, "on_reward_error is 'raise' or .*set reward_retries"),
        ({"reward_retries": -1}, "reward_retries is a whole number, 0 or more; got -1"),
        ({"reward_retries": 1.5}, "reward_retries is a whole number, 0 or more; got 1.5"),
        ({"reward_retry_wait": math.nan}, "reward_retry_wait must be finite and 0 or more"),
        ({"reward_retry_wait": math.inf}, "reward_retry_wait must be finite and 0 or more"),
        ({"reward_timeout": 0.0}, "reward_timeout is a number of seconds above 0; got 0"),
        ({"reward_timeout": math.nan}, "reward_timeout is a number of seconds above 0; got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            RewardBank({"faulty": length}, **wrong)  # type: ignore[arg-type]
