"""Rewards that are a rule, with numbers worked out by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from clp_lightning.rewards import Brevity, Pattern, Plain, Reward, Rouge


def score(reward: Reward, *completions: Any, **columns: Any) -> Any:
    return reward(prompts=["?"] * len(completions), completions=list(completions), **columns)


def words(number: int) -> str:
    return " ".join(["word"] * number)


def test_brevity_is_piecewise_linear() -> None:
    got = score(Brevity(), *map(words, [0, 1, 2, 3, 4, 6, 8, 10, 12, 40]))
    assert got == [-1, -0.5, 0, 0.5, 1, 0.5, 0, -0.5, -1, -1]
    assert score(Brevity(target=10, low=5, high=20, longest=30), words(10), words(25)) == [1, -0.5]


def test_brevity_of_a_target_alone() -> None:
    got = score(Brevity(target=40), *map(words, [0, 20, 40, 60, 80, 120]))
    assert got == [-1, 0, 1, 0.5, 0, -1]
    assert score(Brevity(target=1), "one", "one two") == [1, 0]


def test_brevity_reads_messages() -> None:
    assert score(Brevity(), [{"role": "assistant", "content": words(4)}]) == [1]


def test_plain_counts_distinct_words_only() -> None:
    # "the" and "the" count once: (3 + 5) / 2; digits are no letters; longer than 9 is clipped.
    got = score(Plain(), "The the quick 123", "internationalisation", "a b", "???")
    assert got == [-4.0, -9.0, -3.0, -9.0]


def test_rouge_l_by_hand() -> None:
    # LCS of "the cat sat" and "the cat ran away" is 2: recall 2/3, precision 2/4, F 4/7.
    got = score(Rouge(), "the cat ran away", "anything", summary=["the cat sat", None])
    assert got == [pytest.approx(4 / 7), None]
    assert Rouge(reference="headline").required_columns == ("headline",)


def test_rouge_1_ignores_order() -> None:
    for measure, expected in (("precision", 2 / 3), ("recall", 2 / 4), ("fmeasure", 4 / 7)):
        reward = Rouge(measure=measure)  # type: ignore[arg-type]
        assert score(reward, "the cat ran", summary=["the cat sat down"]) == [
            pytest.approx(expected)
        ]
    assert score(Rouge(kind="rouge1"), "sat cat the", summary=["the cat sat"]) == [1.0]


def test_rouge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .clp_lightning\[rouge\]"):
        Rouge()


def test_pattern() -> None:
    assert score(Pattern(r"^\w+\.$"), "Yes.", "No, no.") == [1.0, 0.0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="0 < low < target < high < longest"):
        Brevity(target=2, low=2)
    with pytest.raises(ValueError, match="0 < shortest < longest"):
        Plain(shortest=9)
    with pytest.raises(ValueError, match="kind 'L'"):
        Rouge(kind="L")
    with pytest.raises(ValueError, match="not a regular expression"):
        Pattern("(")
