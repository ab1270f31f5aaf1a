"""Rollouts in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clp_lightning import LoRA, Pretrained, Rollout, Sampling, TransformersEngine
from clp_lightning.conditioning import PromptText
from tests.helpers import assert_alike, build_policy, prompt_batch

PROMPTS = ["a tale of tea", "ab", "x", "hello", "fog"]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("rewritten", [False, True])
def test_parts_joined_are_the_whole(
    kind: str, rewritten: bool, tiny_folder: Callable[..., Path]
) -> None:
    stop = [1, *range(68, 102)]
    folder = tiny_folder(kind, generation={"eos_token_id": stop})
    base = Pretrained(str(folder), dtype="float64")
    conditioner = PromptText() if rewritten else LoRA(rank=2, shared_rank=2)
    policy = build_policy(base, conditioner, perturb=0.05)
    batch = prompt_batch(PROMPTS)
    batch.columns = {"topic": ["a", "b", "c", "d", "e"]}
    engine, sampling = TransformersEngine(), Sampling(6)
    whole = engine.generate(policy, batch, 2, sampling)
    parts = [
        engine.generate(policy, batch.select(rows), 2, sampling) for rows in ([0], [1, 2], [3, 4])
    ]
    # Prompts and responses of different widths, and prompts of one width in a part.
    assert len({part.input_ids.shape[1] for part in parts}) > 1
    assert len({part.response_ids.shape[1] for part in parts}) > 1
    side: Any = "right" if kind == "t5" else "left"
    joined = Rollout.cat(parts, pad_id=policy.pad_id, pad_prompts=side)
    assert joined.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert (joined.reference_input_ids is not None) == rewritten
    assert_alike(joined, whole)
    assert_alike(Rollout.cat([whole], pad_id=policy.pad_id, pad_prompts=side), whole)
