"""Prompts and responses that meet the end of a model's positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from clp_lightning import Rollout, Sampling, TransformersEngine
from tests.helpers import build_policy, prompt_batch

LIMIT = 12


def generate(folder: Path, max_new_tokens: int) -> Rollout:
    """Prompts of 2 and 5 tokens, responses that nothing ends; scored as well."""
    policy = build_policy(folder)
    policy.stop_ids = []
    batch, sampling = prompt_batch(["ab", "hello"]), Sampling(max_new_tokens)
    rollout = TransformersEngine().generate(policy, batch, 1, sampling)
    with policy.conditioned(rollout.preference):
        policy.logprobs(rollout)
    return rollout


def test_a_table_of_positions_is_a_limit(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("gpt2", n_positions=LIMIT)
    assert generate(folder, 8).response_ids.shape == (2, 8)  # 5 + 8, and the last is never read
    message = (
        "A prompt of 5 tokens and max_new_tokens=9 need 13 positions; the model has 12: lower "
        "max_prompt_tokens or max_new_tokens"
    )
    with pytest.raises(ValueError, match=message):
        generate(folder, 9)


def test_rotary_positions_warn_once(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama", max_position_embeddings=LIMIT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for new in (8, 9, 10):
            assert generate(folder, new).response_ids.shape == (2, new)
    texts = [str(warning.message) for warning in caught]
    assert sum("longer than the 12 positions" in text for text in texts) == 1


def test_relative_positions_have_no_limit(tiny_folder: Callable[..., Path]) -> None:
    assert generate(tiny_folder("t5"), 300).response_ids.shape == (2, 300)
