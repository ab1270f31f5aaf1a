"""Full-rank and prompt conditioning: which parameters move, what is written into prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import (
    LoRA,
    Mixture,
    Preference,
    PromptText,
    Sampling,
    TransformersEngine,
)
from tests.helpers import build_policy, prompt_batch


def test_what_is_conditioned(tiny_folder: Callable[..., Path]) -> None:
    tied = tiny_folder("gpt2")
    keep = build_policy(tied, Mixture("full")).conditioner
    assert len(keep.shared()) == 0
    assert sum("lm_head" in key or "wte" in key for key in keep.deltas[0]) == 1
    split = build_policy(tied, Mixture("logits")).conditioner
    assert list(split.deltas[0]) == ["lm_head/weight"]
    assert "transformer/wte/weight" in split.shared_delta
    frozen = build_policy(tied, Mixture("attention", rest="freeze")).conditioner
    assert len(frozen.shared()) == 0
    assert {key.split("/")[-2] for key in frozen.deltas[0]} == {"c_attn", "c_proj"}
    with pytest.raises(ValueError, match="matches no parameter"):
        build_policy(tied, Mixture(["q_proj"]))


def test_split_leaves_the_input_table_alone(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("gpt2"), Mixture("logits", rest="freeze"), perturb=0.1)
    state = policy.conditioner.fold(Preference.single([0.4, 0.6], 0.2))
    table = policy.model.transformer.wte.weight
    assert torch.equal(state["transformer.wte.weight"], table)
    assert not torch.equal(state["lm_head.weight"], table)


def test_prompt_text(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama", chat=True)
    policy = build_policy(folder, PromptText(rest=LoRA(shared_rank=2)))
    system = {"role": "system", "content": "Be good."}
    prompts = [[system, {"role": "user", "content": text}] for text in ("ab", "hello")]
    rollout = TransformersEngine().generate(policy, prompt_batch(prompts), 2, Sampling(4))
    seen = policy.tokenizer.decode(rollout.input_ids[0][rollout.prompt_mask[0]])
    assert "Be good." in seen
    assert "[kind: 0.10, short: 0.90; stay close: 0.05]\nab" in seen
    assert rollout.reference_input_ids is not None and rollout.reference_prompt_mask is not None
    plain = rollout.reference_input_ids[0][rollout.reference_prompt_mask[0]]
    assert "stay close" not in policy.tokenizer.decode(plain)
    assert rollout.prompts[0] == prompts[0]
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    with policy.reference():
        reference = policy.logprobs(rollout)
    assert (logp - reference).abs().max() > 1e-3  # the text alone moves the policy
    words = PromptText(form="word")
    words._names = ["kind", "short"]
    assert words.text([1.0, 0.0], 0.2) == "[kind: only, short: not at all; stay close: a little]\n"


def test_text_in_front_of_the_last_user_message() -> None:
    conditioner = PromptText()
    conditioner._names = ["kind"]
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    found = conditioner.rewrite(turns, Preference.single([1.0], 0.5))
    assert [message["content"] for message in found] == [  # type: ignore[index]
        "user",
        "assistant",
        "[kind: 1.00; stay close: 0.50]\nuser",
        "assistant",
    ]
    assert turns[2]["content"] == "user"


def test_text_in_front_of_a_list_of_parts() -> None:
    conditioner = PromptText()
    conditioner._names = ["kind"]
    preference = Preference.single([1.0], 0.5)
    image, words = {"type": "image", "url": "a.png"}, {"type": "text", "text": "What?"}
    found: Any = conditioner.rewrite([{"role": "user", "content": [image, words]}], preference)
    said = "[kind: 1.00; stay close: 0.50]\n"
    assert found[0]["content"] == [image, {"type": "text", "text": f"{said}What?"}]
    found = conditioner.rewrite([{"role": "user", "content": [image]}], preference)
    assert found[0]["content"] == [{"type": "text", "text": said}, image]
