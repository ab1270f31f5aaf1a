"""Full-rank conditioning: merging equals mixing per row, equals plain weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    Pretrained,
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner
from tests.helpers import build_policy, prompt_batch
from tests.policy.test_logprobs import plain_logprobs
from tests.tiny import KINDS

PROMPTS = ["ab", "hello", "a prompt past the window"]
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "full": lambda: Mixture("full"),
    "attention": lambda: Mixture("attention"),
    "attention, rest frozen": lambda: Mixture("attention", rest="freeze"),
    "logits": lambda: Mixture("logits"),
    "soft prompt": lambda: SoftPrompt(),
    "soft prompt and LoRA": lambda: SoftPrompt(LoRA(shared_rank=2)),
}


def rollout_of(policy: Policy, n: int = 2, groups: int = 3) -> Rollout:
    """Responses under one preference per group, sampled group by group."""
    batch = prompt_batch(PROMPTS[:groups])
    return TransformersEngine().generate(policy, batch, n, Sampling(8))


def gradients(policy: Policy, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = policy.trained_parameters()
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout) * rollout.response_mask
    found = torch.autograd.grad(logp.sum(), list(parameters.values()), allow_unused=True)
    zero = {n: torch.zeros_like(p) for n, p in parameters.items()}
    return logp, zero | {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("kind", KINDS)
def test_row_equals_merged_equals_plain_weights(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    folder = tiny_folder(kind)
    # Float64, because T5's attention is not scaled and magnifies rounding.
    base = Pretrained(str(folder), dtype="float64")
    policy = build_policy(base, CONDITIONERS[name](), perturb=0.02)
    rollout = rollout_of(policy)
    alone = [rollout.select(rollout.groups == group) for group in range(3)]
    merged = [gradients(policy, part) for part in alone]
    for group, part in enumerate(alone):  # against plain Transformers on folded weights
        plain = plain_logprobs(folder, policy, part, 0)
        got = merged[group][0][0][part.response_mask[0]].float()
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=0)
    reason = policy.conditioner.why_not_rows()
    if reason is not None:
        assert kind.startswith("t5") and "relative-position" in reason
        with (
            pytest.raises(ValueError, match="relative-position"),
            policy.conditioned(rollout.preference),
        ):
            policy.logprobs(rollout)
        return
    logp, by_row = gradients(policy, rollout)
    torch.testing.assert_close(logp, torch.cat([m[0] for m in merged]), atol=1e-5, rtol=1e-5)
    scale = max(float(g.abs().max()) for g in by_row.values())
    for key, gradient in by_row.items():
        total = sum(m[1][key] for m in merged)
        torch.testing.assert_close(gradient, total, atol=1e-5 * scale, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("kind", KINDS)
def test_step_zero_and_alpha_one_are_the_reference(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    policy = build_policy(tiny_folder(kind), CONDITIONERS[name]())
    rollout = rollout_of(policy, groups=1)
    with policy.conditioned(rollout.preference):
        start = policy.logprobs(rollout)
    with policy.reference():
        reference = policy.logprobs(rollout)
    torch.testing.assert_close(start, reference, atol=1e-5, rtol=0)
    for parameter in policy.trained_parameters().values():
        parameter.data.normal_(std=0.05)
    with torch.no_grad(), policy.conditioned(Preference.single([0.4, 0.6], 1.0)):
        at_one = policy.logprobs(rollout)
    torch.testing.assert_close(at_one, reference, atol=1e-5, rtol=0)
    with torch.no_grad(), policy.conditioned(Preference.single([0.4, 0.6], 0.2)):
        moved = policy.logprobs(rollout)
    assert (moved - reference).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing(tiny_folder: Callable[..., Path], kind: str) -> None:
    results = []
    for checkpointing in (False, True):
        policy = build_policy(
            tiny_folder(kind), Mixture(), perturb=0.02, gradient_checkpointing=checkpointing
        )
        rollout = rollout_of(policy, groups=1)
        results.append(gradients(policy, rollout)[1])
    scale = max(float(g.abs().max()) for g in results[0].values())
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient, atol=1e-5 * scale, rtol=1e-4, msg=key)


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


def test_gradient_of_a_copy_is_its_coefficient_times_the_merged_one(
    tiny_folder: Callable[..., Path],
) -> None:
    """d loss / d Delta_i = c_i d loss / d theta."""
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.02)
    rollout = rollout_of(policy, groups=1)
    c = policy.conditioner.coefficients(rollout.preference[:1])[0]
    _, found = gradients(policy, rollout)
    for key in policy.conditioner.deltas[0]:
        first, second = (found[f"conditioner.deltas.{i}.{key}"] for i in range(2))
        torch.testing.assert_close(first / c[0], second / c[1], atol=1e-4, rtol=1e-3)


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
