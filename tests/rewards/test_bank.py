"""The bank calls rewards as TRL does, and no bad answer passes unnoticed."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clp_lightning import Preference, Rollout
from clp_lightning.rewards import Brevity, Function, Plain, Reward, RewardBank, RewardError
from clp_lightning.types import Prompt

nan = math.nan


def rollout(
    completions: list[str], prompts: list[Prompt] | None = None, **columns: list[Any]
) -> Rollout:
    size = len(completions)
    ids = torch.arange(4).repeat(size, 1)
    return Rollout(
        prompts=[f"prompt {i}" for i in range(size)] if prompts is None else prompts,
        prompt_ids=torch.arange(size),
        groups=torch.arange(size),
        sample=torch.zeros(size, dtype=torch.long),
        preference=Preference(torch.ones(size, 1), torch.zeros(size)),
        input_ids=ids,
        prompt_mask=torch.ones(size, 4, dtype=torch.bool),
        response_ids=ids,
        # Row b holds b + 1 tokens, the last of them the stop token.
        response_mask=torch.arange(4) <= torch.arange(size)[:, None],
        completions=completions,
        truncated=torch.zeros(size, dtype=torch.bool),
        columns=columns,
    )


def returning(value: Any) -> Callable[..., Any]:
    return lambda **_: value


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


async def slow_length(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return length(completions)


def times(completions: list[str], factor: float, **_: Any) -> list[float]:
    return [factor * len(completion) for completion in completions]


class Instance:
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return length(completions)


class Own(Reward):
    required_columns = ("document",)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [float(len(document)) for document in columns["document"]]


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


def test_one_reward_gives_one_column() -> None:
    assert RewardBank({"only": length})(rollout(["a", "bb", "ccc"])).raw.tolist() == [[1], [2], [3]]


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


async def raising_later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return raising(completions)


def value_where_bad(value: Any) -> Callable[..., Any]:
    return lambda completions, **_: [value if c == "bad" else 1.0 for c in completions]


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, "raised KeyError: 'score'"),
    "raises later": (raising_later, "raised KeyError: 'score'"),
    "nan": (value_where_bad(nan), "returned nan"),
    "infinity": (value_where_bad(-math.inf), "returned -inf"),
    "over float32": (value_where_bad(1e39), r"returned 1e\+39, no finite float32"),
    "over float": (value_where_bad(-(10**400)), "returned -inf, no finite float32"),
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
    bank = RewardBank({"fine": length, "faulty": function}, on_error="drop")
    for count in (1, 2):
        scores = bank(rollout(["good", "bad", "also good"]))
        assert scores.kept.tolist() == [True, False, True]
        torch.testing.assert_close(
            scores.raw, torch.tensor([[4.0, 1], [3, nan], [9, 1]]), equal_nan=True
        )
        assert bank.dropped == count


def test_a_fault_of_the_whole_batch_drops_all() -> None:
    bank = RewardBank({"faulty": returning("0.5")}, on_error="drop")
    scores = bank(rollout(["a", "b"]))
    assert not scores.kept.any()
    assert scores.raw.isnan().all()
    with pytest.raises(RewardError, match="'faulty' returned a str, not a list"):
        RewardBank({"faulty": returning("0.5")})(rollout(["a", "b"]))


def test_a_reward_that_always_fails_says_why() -> None:
    bank = RewardBank({"fine": length, "faulty": raising}, on_error="drop")
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

    scores = RewardBank({"rank": rank}, on_error="drop")(rollout(["b", "bad", "a", "c"]))
    torch.testing.assert_close(scores.raw[:, 0], torch.tensor([1, nan, 0, 2]), equal_nan=True)


def test_changing_a_message_inside_is_seen_and_harms_nobody() -> None:
    batch = rollout(["bad"], prompts=[[{"role": "user", "content": "?"}]])

    def change(prompts: list[Any], **_: Any) -> list[float]:
        prompts[0][0]["content"] = "!"
        return [0.0]

    with pytest.raises(RewardError, match="changed the list 'prompts'"):
        RewardBank({"change": change})(batch)
    assert batch.prompts == [[{"role": "user", "content": "?"}]]


def test_names() -> None:
    with pytest.raises(ValueError, match="no reward"):
        RewardBank({})
    for name in ("", "a/b", "a=1", "a,b", "a b"):
        with pytest.raises(ValueError, match="cannot be the name of a reward"):
            RewardBank({name: length})
    with pytest.raises(ValueError, match="'x' is a int"):
        RewardBank({"x": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="on_error"):
        RewardBank({"x": length}, on_error="ignore")  # type: ignore[arg-type]


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
