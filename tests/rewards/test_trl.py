"""TRL's six shipped rewards run unchanged, and give what they give when called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import rewards as trl

from clp_lightning.rewards import Function, RewardBank
from tests.rewards.rollouts import rollout

TEXTS = [
    r"<think>One third.</think>It is \boxed{\frac{1}{3}}",
    r"It is \boxed{\frac{1}{2}}",
    "No idea.",
]
PROMPTS = [[{"role": "user", "content": "What is 2/6?"}]] * 3
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in TEXTS]
IDS = [[0], [0, 1], [0, 1, 2]]  # of tests.rewards.rollouts.rollout
SOLUTION = [r"\frac{1}{3}", r"\frac{1}{3}", "what?"]


def test_conversational() -> None:
    # math_verify's time limit needs the main thread, which the bank does not leave.
    functions: dict[str, Any] = {
        "accuracy": trl.accuracy_reward,
        "think": trl.think_format_reward,
        "reasoning": trl.reasoning_accuracy_reward,
        "cosine": trl.get_cosine_scaled_reward(max_len=4),
        "repetition": trl.get_repetition_penalty_reward(ngram_size=2),
        "overlong": trl.get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2),
    }
    bank = RewardBank(functions)
    bank.check_columns(["solution"])
    with pytest.raises(ValueError, match=r"'accuracy' needs the columns \['solution'\]"):
        bank.check_columns(["document"])
    scores = bank(rollout(TEXTS, prompts=PROMPTS, solution=SOLUTION))
    direct = [
        f(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, solution=SOLUTION)
        for f in functions.values()
    ]
    expected = torch.tensor([[torch.nan if s is None else s for s in column] for column in direct])
    torch.testing.assert_close(scores.raw, expected.T, equal_nan=True)
    # By hand: the first answer is right, the second wrong; of 1, 2 and 3 tokens one is free.
    assert scores.raw[:2, 0].tolist() == [1.0, 0.0]
    assert scores.raw[:, 1].tolist() == [1.0, 0.0, 0.0]
    assert scores.raw[:, 5].tolist() == [0.0, -0.5, -1.0]
    assert bank.extra["solution"] == SOLUTION


def test_standard_format_and_factories_by_import_path() -> None:
    bank = RewardBank(
        {
            "overlong": Function(
                "trl.rewards.get_soft_overlong_punishment",
                {"max_completion_len": 3, "soft_punish_cache": 2},
                factory=True,
            ),
            "repetition": Function(
                "trl.rewards.get_repetition_penalty_reward", {"ngram_size": 1}, factory=True
            ),
        }
    )
    scores = bank(rollout(["a", "b", "c"]))
    assert scores.raw.tolist() == [[0.0, 0.0], [-0.5, 0.0], [-1.0, 0.0]]
