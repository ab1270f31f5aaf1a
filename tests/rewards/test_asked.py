"""Several questions at once are one question in parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clp_lightning.rewards import RewardBank, RewardError
from tests.rewards.rollouts import length, rollout

TEXTS = ["a", "bb", "nan", "ccc", "none", "dddd"]


def telling(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[Any]:
    """Reports the mean length and every text; fails on some texts."""
    log_metric("length", sum(map(len, completions)) / len(completions))
    log_extra("text", completions)
    if "ccc" in completions:
        log_extra("rare", [text.upper() for text in completions])
    special = {"nan": math.nan, "none": None}
    return [special.get(text, float(len(text))) for text in completions]


async def later(completions: list[str], **_: Any) -> list[float]:
    return length(completions)


def make(**options: Any) -> RewardBank:
    return RewardBank({"telling": telling, "later": later}, **options)


@pytest.mark.filterwarnings("ignore:Reward 'telling':UserWarning")
@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 1, 3)], ids=str)
def test_answers_to_parts_are_those_to_the_whole(sizes: tuple[int, ...]) -> None:
    whole = rollout(TEXTS, document=[*"uvwxyz"])
    one, several = make(on_reward_error="drop"), make(on_reward_error="drop")
    expected = one(whole)
    parts = [several.ask(whole.select(rows)) for rows in torch.arange(6).split(list(sizes))]
    assert several.are_about(parts, whole)
    found = several.answers(parts)
    torch.testing.assert_close(found.raw, expected.raw, equal_nan=True)
    assert found.kept.tolist() == expected.kept.tolist()
    assert found.kept.tolist() == [True, True, False, True, True, True]
    assert (several.dropped, several.problems) == (one.dropped, one.problems) == (1, one.problems)
    assert several.metrics == pytest.approx(one.metrics) and one.metrics
    assert several.extra["text"] == one.extra["text"] == TEXTS
    # What a part does not report is None there.
    first = 6 - sizes[-1]
    assert several.extra["rare"] == [None] * first + one.extra["rare"][first:]


def test_the_first_reward_that_failed_is_told_with_the_response() -> None:
    def fails(completions: list[str], **_: Any) -> list[float]:
        raise ConnectionError("busy")

    whole = rollout(TEXTS)
    texts = []
    for sizes in ([6], [2, 4]):
        bank = RewardBank({"telling": telling, "fails": fails})
        parts = [bank.ask(whole.select(rows)) for rows in torch.arange(6).split(sizes)]
        with pytest.raises(RewardError, match="'telling' returned nan") as caught:
            bank.answers(parts)
        texts.append(str(caught.value))
        assert bank.dropped == 0 and bank.metrics == {}
    assert texts[0] == texts[1] and texts[0].endswith("Prompt: 'prompt 2' Completion: 'nan'")


def test_what_differs_is_another_question() -> None:
    bank, whole = make(), rollout(["a", "bb"], document=["x", "y"])
    asked = [bank.ask(whole)]
    assert bank.are_about(asked, whole)
    assert not bank.are_about(asked, whole.select(torch.tensor([0])))
    assert not bank.are_about(asked, whole.select(torch.tensor([1, 0])))
    for name, value in [
        ("completions", ["a", "cc"]),
        ("prompts", ["prompt 0", "other"]),
        ("columns", {"document": ["x", "z"]}),
        ("columns", {}),
        ("response_ids", whole.response_ids + 1),
    ]:
        other = whole.select(torch.arange(2))
        setattr(other, name, value)
        assert not bank.are_about(asked, other), name
