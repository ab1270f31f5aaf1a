"""Decode-time mixtures against their definition, over every response of one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clp_lightning import (
    MOD,
    DeRa,
    LoRA,
    Mixture,
    Policy,
    Preference,
    Pretrained,
    PromptBatch,
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
    Weights,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.policy import rollout as rollout_module
from clp_lightning.policy.sampling import sample_tokens
from tests.helpers import build_policy, prompt_batch
from tests.tiny import KINDS

# With one model that can mix rows and one that cannot: T5, but for LoRA.
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "LoRA": lambda: LoRA(rank=2, shared_rank=2),
    "full": lambda: Mixture("full"),
    "soft prompt": lambda: SoftPrompt(),
}
PROMPTS = ["hello", "ab"]
ASKED = Preference(
    torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]]), torch.tensor([0.2, 0.2, 0.5])
)


def tempered(folder: Path, conditioner: Conditioner, temperature: float) -> Policy:
    base = Pretrained(str(folder), dtype="float64")
    return build_policy(base, conditioner, perturb=0.04, temperature=temperature)


def first_token(policy: Policy, preference: Preference | None) -> Tensor:
    """Log-probabilities of every first token after each prompt, shape (P, V), without ours."""
    rows = []
    scope = policy.conditioner
    for prompt in PROMPTS:
        ids, _ = policy.encode([prompt])
        more = {}
        if policy.model.config.is_encoder_decoder:
            more["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad(), scope.reference() if preference is None else scope.merged(preference):
            logits = policy.model(input_ids=ids, **more).logits[0, -1]
        rows.append((logits / policy.temperature).log_softmax(-1))
    return torch.stack(rows)


def sampled(policy: Policy, engine: MOD | DeRa, preference: Preference, n: int = 40) -> Rollout:
    """n responses of up to two tokens to every prompt, under every preference."""
    count = len(preference)
    batch = PromptBatch(
        [prompt for prompt in PROMPTS for _ in range(count)],
        torch.arange(len(PROMPTS)).repeat_interleave(count),
        preference=Preference.cat([preference] * len(PROMPTS)),
    )
    rollout = engine.generate(policy, batch, n, Sampling(2, policy.temperature))
    assert rollout.logp is not None
    return rollout


def enumerated(policy: Policy, rollout: Rollout, engine: MOD | DeRa) -> Tensor:
    """Log-probabilities of every response of one token to the first row's prompt."""
    count = policy.model.config.vocab_size
    every = rollout.select(torch.zeros(count, dtype=torch.long))
    ids, mask = torch.arange(count)[:, None], torch.ones(count, 1, dtype=torch.bool)
    return engine.logprobs(policy, replace(every, response_ids=ids, response_mask=mask))[:, 0]


def check(policy: Policy, engine: MOD | DeRa, asked: Preference, expected: list[Tensor]) -> None:
    """``expected``: for every preference, log-probabilities (P, V)."""
    rollout = sampled(policy, engine, asked)
    assert rollout.logp is not None
    logp = rollout.logp[:, 0].unflatten(0, (len(PROMPTS), len(asked), -1))
    tokens = rollout.response_ids[:, 0].unflatten(0, (len(PROMPTS), len(asked), -1))
    for i, distribution in enumerate(expected):
        torch.testing.assert_close(
            logp[:, i], distribution.gather(-1, tokens[:, i]), atol=1e-5, rtol=0
        )
        mine = rollout.select(rollout.groups == i)
        exact = enumerated(policy, mine, engine)
        torch.testing.assert_close(exact, distribution[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(exact.exp().sum().item(), 1.0)
        one = engine.logprobs(policy, mine)[mine.response_mask]  # of both tokens
        torch.testing.assert_close(one, mine.logp[mine.response_mask], atol=1e-5, rtol=0)  # type: ignore[index]


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("kind", KINDS)
def test_mod_is_the_geometric_mixture_of_the_corners(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    policy = tempered(tiny_folder(kind), CONDITIONERS[name](), temperature=1.3)
    expected = []
    for weights, alpha in zip(ASKED.weights, ASKED.alpha.tolist(), strict=True):
        corners = [first_token(policy, Preference.single(row, alpha)) for row in torch.eye(2)]
        mixed = weights[0] * corners[0] + weights[1] * corners[1]
        expected.append(mixed.log_softmax(-1))
    own = first_token(policy, ASKED[2:])
    assert (own - expected[2]).abs().max() > 1e-4  # another policy than the conditioned one
    check(policy, MOD(), ASKED, expected)


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("kind", KINDS)
def test_dera_mixes_the_reference_in(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    policy = tempered(tiny_folder(kind), CONDITIONERS[name](), temperature=1.3)
    reference = first_token(policy, None)
    expected = []
    # lambda = (0.2 / 0.8) (1 - alpha) / alpha: 1 at alpha = 0.2, 0.25 at alpha = 0.5
    for weights, share in zip(ASKED.weights, (1.0, 1.0, 0.25), strict=True):
        tuned = first_token(policy, Preference.single(weights, 0.2))
        expected.append(((1 - share) * reference + share * tuned).log_softmax(-1))
    assert (expected[2] - reference).abs().max() > 1e-3
    check(policy, DeRa(0.2), ASKED, expected)


@pytest.mark.parametrize("engine", [MOD(), DeRa(0.2)])
def test_mixtures_of_the_reference_are_the_reference(
    tiny_folder: Callable[..., Path], engine: MOD | DeRa
) -> None:
    policy = tempered(tiny_folder("t5"), Mixture(), temperature=1.0)
    with policy.reference():
        rollout = sampled(policy, engine, ASKED[:1])
    assert rollout.logp is not None
    tokens = rollout.response_ids[:, 0].unflatten(0, (2, -1))
    expected = first_token(policy, None).gather(-1, tokens).flatten()
    torch.testing.assert_close(rollout.logp[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", [MOD(), DeRa(0.2)])
def test_one_reward(tiny_folder: Callable[..., Path], engine: MOD | DeRa) -> None:
    policy = Policy(Pretrained(str(tiny_folder("t5")), dtype="float64"), Mixture())
    policy.build(["only"])
    for parameter in policy.trained_parameters().values():
        parameter.data.normal_(std=0.02)
    asked = Preference(torch.ones(1, 1), torch.tensor([0.2]))
    check(policy, engine, asked, [first_token(policy, asked)])


def test_dera_needs_a_reference(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), LoRA(coefficients=Weights()))
    with pytest.raises(ValueError, match="vanish there"):
        sampled(policy, DeRa(0.2), ASKED)
    with pytest.raises(ValueError, match="alpha above 0"):
        sampled(policy, DeRa(0.2), Preference.single([0.3, 0.7], 0.0))


@pytest.mark.parametrize("engine", [MOD(), DeRa()])
def test_a_preference_in_the_prompt_cannot_be_mixed(
    tiny_folder: Callable[..., Path], engine: MOD | DeRa
) -> None:
    policy = build_policy(tiny_folder("llama"), PromptText(rest=LoRA(shared_rank=2)))
    name = type(engine).__name__
    with pytest.raises(ValueError, match=f"{name} mixes .* PromptText writes the preference into"):
        sampled(policy, engine, ASKED)


def test_mixtures_are_for_evaluation() -> None:
    assert TransformersEngine.on_policy
    assert not MOD().on_policy and not DeRa().on_policy


def test_a_mixture_is_not_rounded_to_a_half_precision_base(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build_policy(Pretrained(str(tiny_folder()), dtype="bfloat16"))
    seen: list[Tensor] = []

    def noted(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        seen.append(logits)
        return sample_tokens(logits, *others)

    monkeypatch.setattr(rollout_module, "sample_tokens", noted)
    MOD().generate(policy, prompt_batch(PROMPTS), 2, Sampling(3))
    assert {logits.dtype for logits in seen} == {torch.float32}
