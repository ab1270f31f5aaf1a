"""Decoding with copies of the weights in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    Pretrained,
    Sampling,
    SoftPrompt,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.policy.prefix import read_prompt
from clp_lightning.policy.steps import Steps
from tests.helpers import PROMPTS, build_policy, prompt_batch
from tests.tiny import ENCODER_DECODERS

CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "full": lambda: Mixture("full"),  # mixes rows
    "attention": lambda: Mixture("attention", rest="freeze"),
    "LoRA": lambda: LoRA(rank=2, shared_rank=2),
    "soft prompt": lambda: SoftPrompt(),
}


@pytest.mark.parametrize("conditioner", CONDITIONERS)
@torch.no_grad()
def test_the_model_computes_in_bfloat16_and_then_as_before(
    tiny_folder: Callable[..., Path], conditioner: str
) -> None:
    policy = build_policy(tiny_folder("llama"), CONDITIONERS[conditioner](), perturb=0.05)
    preference = prompt_batch(PROMPTS).preference
    assert preference is not None
    ids, mask = policy.encode(PROMPTS)
    rows = torch.arange(len(ids))
    logits = []
    before = dict(policy.named_parameters())
    for dtype in (None, torch.bfloat16, None):
        with policy.conditioned(preference), Steps(4, dtype).rows(policy, rows):
            logits.append(read_prompt(policy.model, ids, mask).logits)
    exact, low, again = logits
    assert low.dtype == torch.bfloat16 and torch.equal(exact, again)
    off = (low.float() - exact).abs().max() / exact.abs().max()
    assert 0 < off < 0.05
    assert all(before[name] is parameter for name, parameter in policy.named_parameters())


def test_tokens_are_those_of_a_model_in_bfloat16(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama")
    policy = build_policy(folder, Mixture("full"), perturb=0.05)
    batch = prompt_batch(["hello"])
    assert batch.preference is not None
    engine = TransformersEngine(precision="bf16")
    rollout = engine.generate(policy, batch, 1, Sampling(16, temperature=0))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.load_state_dict(policy.conditioner.fold(batch.preference))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=policy.pad_id,
        eos_token_id=list(policy.stop_ids),
    )
    prompt = rollout.input_ids
    found = model.bfloat16().generate(prompt, generation_config=config)[0, prompt.shape[1] :]
    assert rollout.response_ids[0][rollout.response_mask[0]].tolist() == found.tolist()


def test_log_probabilities_are_the_scoring_pass_s(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.05)
    engine = TransformersEngine(precision="bf16")
    rollout = engine.generate(policy, prompt_batch(PROMPTS), 2, Sampling(8))
    assert rollout.logp is None
    with torch.no_grad(), policy.conditioned(rollout.preference):
        expected = policy.logprobs(rollout)
    assert torch.equal(engine.logprobs(policy, rollout), expected)


def test_sharded_weights_are_refused(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build_policy(tiny_folder("llama"))
    monkeypatch.setattr(Policy, "is_sharded", True)
    for engine in (TransformersEngine(precision="bf16"), TransformersEngine(compile=True)):
        with pytest.raises(ValueError, match="sharded weights"):
            engine.generate(policy, prompt_batch(PROMPTS), 2, Sampling(4))


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be None or 'bf16'"):
        TransformersEngine(precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_trained_position_biases_round_as_the_reference_s(
    tiny_folder: Callable[..., Path], kind: str, autocast: bool
) -> None:
    dtype = "float32" if autocast else "bfloat16"
    policy = build_policy(Pretrained(str(tiny_folder(kind)), dtype=dtype), Mixture("full"))
    preference = Preference.single([0.3, 0.7], 0.1)
    batch = prompt_batch(PROMPTS, preference[torch.zeros(len(PROMPTS), dtype=torch.long)])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rollout = TransformersEngine().generate(policy, batch, 2, Sampling(12))
        with policy.conditioned(rollout.preference):
            own = policy.logprobs(rollout)
        with policy.reference():
            reference = policy.logprobs(rollout)
    assert own.requires_grad and torch.equal(own, reference)
