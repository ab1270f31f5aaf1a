"""Decode-time mixtures against their definition, on the first token of a response."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clp_lightning import (
    MOD,
    DeRa,
    LoRA,
    Policy,
    Preference,
    PromptBatch,
    Sampling,
    TransformersEngine,
    Weights,
)
from tests.helpers import build_policy


def first_token(policy: Policy, preference: Preference | None) -> Tensor:
    """Log-probabilities of the first token after "hello", by the plain forward."""
    ids, _ = policy.encode(["hello"])
    scope = policy.conditioner
    with torch.no_grad(), scope.reference() if preference is None else scope.merged(preference):
        return policy.model(input_ids=ids).logits[0, -1].log_softmax(-1)


def sampled(policy: Policy, engine: MOD | DeRa, preference: Preference) -> tuple[Tensor, Tensor]:
    batch = PromptBatch(["hello"], torch.tensor([3]), preference=preference)
    rollout = engine.generate(policy, batch, 400, Sampling(2))
    assert rollout.logp is not None
    return rollout.response_ids[:, 0], rollout.logp[:, 0]


def test_mod_is_the_geometric_mixture_of_the_corners(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.15)
    weights, alpha = torch.tensor([0.3, 0.7]), 0.2
    corners = torch.stack(
        [first_token(policy, Preference.single(row, alpha)) for row in torch.eye(2)]
    )
    expected = (weights.unsqueeze(-1) * corners).sum(0).log_softmax(-1)
    tokens, logp = sampled(policy, MOD(), Preference.single(weights, alpha))
    torch.testing.assert_close(logp, expected[tokens], atol=1e-4, rtol=0)
    own = first_token(policy, Preference.single(weights, alpha))
    assert (own - expected).abs().max() > 1e-2  # another policy than the conditioned one


def test_dera(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.15)
    preference = Preference.single([0.3, 0.7], 0.5)
    # lambda = (0.2 / 0.8) * 0.5 / 0.5 = 0.25
    tuned = first_token(policy, Preference.single([0.3, 0.7], 0.2))
    expected = (0.75 * first_token(policy, None) + 0.25 * tuned).log_softmax(-1)
    tokens, logp = sampled(policy, DeRa(0.2), preference)
    torch.testing.assert_close(logp, expected[tokens], atol=1e-4, rtol=0)
    tokens, logp = sampled(policy, DeRa(0.2), Preference.single([0.3, 0.7], 0.2))
    torch.testing.assert_close(logp, tuned[tokens], atol=1e-4, rtol=0)  # lambda = 1


def test_dera_needs_a_reference(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), LoRA(coefficients=Weights()))
    with pytest.raises(ValueError, match="vanish there"):
        sampled(policy, DeRa(0.2), Preference.single([0.3, 0.7], 0.5))


def test_mixtures_are_for_evaluation() -> None:
    assert TransformersEngine.on_policy
    assert not MOD().on_policy and not DeRa().on_policy
