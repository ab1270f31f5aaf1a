"""The encoder of T5 runs once for every prompt and pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clp_lightning import (
    MOD,
    CLPCallback,
    FixedAlpha,
    LoRA,
    Mixture,
    Policy,
    PromptText,
    Sampling,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner
from tests.helpers import build_policy, prompt_batch
from tests.runs import Perturbed, make_data, make_module, make_trainer
from tests.tiny import ENCODER_DECODERS

PROMPTS = ["ab", "hello", "one more"]
CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "LoRA": lambda: LoRA(rank=2, shared_rank=2),
    "full": lambda: Mixture(),  # cannot mix rows: one preference after the other
    "text": lambda: PromptText(),
}


def count(policy: Policy) -> list[int]:
    """Prompts of every call of the encoder from now on."""
    calls: list[int] = []
    encoder = policy.model.get_encoder()
    encoder.register_forward_hook(lambda module, args, out: calls.append(len(out[0])))
    return calls


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_once_per_prompt_in_rollouts(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    policy = build_policy(tiny_folder(kind), CONDITIONERS[name](), perturb=0.02)
    calls = count(policy)
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 5, Sampling(6))
    assert len(rollout) == 15 and len(rollout.response_ids[0]) > 1
    assert sum(calls) == len(PROMPTS)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_once_per_prompt_in_scoring(
    tiny_folder: Callable[..., Path], checkpointing: bool, share: bool
) -> None:
    policy = build_policy(tiny_folder("t5"), perturb=0.02, gradient_checkpointing=checkpointing)
    policy.share_prompts = share
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 5, Sampling(6))
    calls = count(policy)
    with policy.conditioned(rollout.preference):
        policy.logprobs(rollout)
    assert calls == [3]
    with policy.reference():
        policy.logprobs(rollout)
    assert calls == [3, 3]


def test_once_per_prompt_and_corner_in_mod(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("t5"), perturb=0.02)
    calls = count(policy)
    MOD().generate(policy, prompt_batch(PROMPTS), 5, Sampling(6))
    assert sum(calls) == 2 * len(PROMPTS)  # the encoder is conditioned, too


def test_a_step_has_three_passes(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    module = make_module(tiny_folder("t5"), Perturbed, statistics_prompts=0)
    module.configure_model()
    calls = count(module.policy)
    trainer = make_trainer(tmp_path, CLPCallback(alpha=FixedAlpha(0.3)), max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    assert calls == [2, 2, 2]  # sampling, scoring, the reference: two prompts each
