"""What docs/method.md, section 2 promises of every conditioner, on every family of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clp_lightning import (
    Gate,
    LoRA,
    Mixture,
    Policy,
    Preference,
    Pretrained,
    PromptText,
    Rollout,
    Sampling,
    Scaled,
    SoftPrompt,
    TransformersEngine,
    Weights,
)
from clp_lightning.conditioning import Conditioner
from tests.helpers import PROMPTS, build_policy, prompt_batch
from tests.policy.test_logprobs import plain_logprobs
from tests.tiny import ENCODER_DECODERS, KINDS

CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "full": lambda: Mixture("full"),
    "full, split": lambda: Mixture("full", tied="split"),
    "attention": lambda: Mixture("attention"),
    "attention, rest frozen": lambda: Mixture("attention", rest="freeze"),
    "logits": lambda: Mixture("logits"),
    "logits, kept tied": lambda: Mixture("logits", tied="keep"),
    "logits, rest frozen": lambda: Mixture("logits", rest="freeze"),
    "LoRA": lambda: LoRA(rank=2, shared_rank=2),
    "LoRA everywhere": lambda: LoRA(rank=2, targets="all-linear+output", shared_rank=0),
    "soft prompt": lambda: SoftPrompt(),
    "soft prompt and LoRA": lambda: SoftPrompt(LoRA(shared_rank=2)),
    "text": lambda: PromptText(),
    "text and LoRA": lambda: PromptText("word", LoRA(shared_rank=2)),
    "gate": lambda: Mixture("attention", coefficients=Gate(4)),
    "constant shared part": lambda: SoftPrompt(coefficients=Weights(shared="constant")),
}
VANISHING = [name for name in CONDITIONERS if name != "constant shared part"]
COPIES = ["full", "full, split", "attention", "logits", "LoRA", "LoRA everywhere", "soft prompt"]


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


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5 * scale, rtol=1e-4, msg=key)


def double(folder: Path) -> Pretrained:
    # T5's attention is not scaled and magnifies rounding. Norms of the Llama family compute in
    # single precision all the same, hence 1e-5.
    return Pretrained(str(folder), dtype="float64")


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("kind", KINDS)
def test_row_equals_merged_equals_plain_weights(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    folder = tiny_folder(kind)
    policy = build_policy(double(folder), CONDITIONERS[name](), perturb=0.02)
    rollout = rollout_of(policy)
    alone = [rollout.select(rollout.groups == group) for group in range(3)]
    merged = [gradients(policy, part) for part in alone]
    for group, part in enumerate(alone):  # against plain Transformers on folded weights
        plain = plain_logprobs(folder, policy, part, 0)
        got = merged[group][0][0][part.response_mask[0]].float()
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=0)
    reason = policy.conditioner.why_not_rows()
    everything_frozen = name.endswith("rest frozen") or "LoRA" in name
    assert (reason is not None) == (kind in ENCODER_DECODERS and not everything_frozen)
    if reason is not None:
        assert "relative-position" in reason
        with (
            pytest.raises(ValueError, match="relative-position"),
            policy.conditioned(rollout.preference),
        ):
            policy.logprobs(rollout)
        return
    logp, by_row = gradients(policy, rollout)
    torch.testing.assert_close(logp, torch.cat([m[0] for m in merged]), atol=1e-5, rtol=1e-5)
    assert_same(by_row, {key: sum((m[1][key] for m in merged), torch.zeros(())) for key in by_row})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["full", "attention", "logits, rest frozen", "gate"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_rows_that_share_their_alpha_equal_merged_ones(
    tiny_folder: Callable[..., Path], kind: str, name: str, checkpointing: bool
) -> None:
    policy = build_policy(
        double(tiny_folder(kind)),
        CONDITIONERS[name](),
        perturb=0.02,
        gradient_checkpointing=checkpointing,
    )
    if name == "gate":  # as it starts: its coefficients sum to 1 - alpha, by chance
        for parameter in policy.conditioner.coefficients.gate[-1].parameters():  # type: ignore[index,union-attr]
            parameter.data.zero_()
    share = torch.tensor([0.1, 0.3, 0.8])
    preference = Preference(torch.stack([share, 1 - share], 1), torch.full((3,), 0.2))
    rollout = TransformersEngine().generate(
        policy, prompt_batch(PROMPTS, preference), 2, Sampling(8)
    )
    merged = [gradients(policy, rollout.select(rollout.groups == group)) for group in range(3)]
    logp, by_row = gradients(policy, rollout)
    torch.testing.assert_close(logp, torch.cat([m[0] for m in merged]), atol=1e-5, rtol=1e-5)
    assert_same(by_row, {key: sum((m[1][key] for m in merged), torch.zeros(())) for key in by_row})
    with torch.no_grad(), policy.conditioned(rollout.preference):
        for _ in range(2):  # the second time from what the first one kept
            again = policy.logprobs(rollout) * rollout.response_mask
            torch.testing.assert_close(again, logp.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VANISHING)
@pytest.mark.parametrize("kind", KINDS)
def test_step_zero_and_alpha_one_are_the_reference(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    policy = build_policy(tiny_folder(kind), CONDITIONERS[name]())
    rollout = rollout_of(policy, groups=1)
    # On the same prompt: what prompt-CLP writes into the policy's is not what this is about.
    rollout = replace(rollout, reference_input_ids=None, reference_prompt_mask=None)
    with torch.no_grad(), policy.conditioned(rollout.preference):
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


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_copy_scales_with_its_coefficient(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    """d loss / d Delta_i = c_i d loss / d theta: copies that are alike differ by c alone."""
    policy = build_policy(double(tiny_folder(kind)), CONDITIONERS[name](), perturb=0.02)
    copies = policy.conditioner.copies()
    for first, second in zip(*copies, strict=True):
        second.data.copy_(first.data)
    rollout = rollout_of(policy, groups=1)
    c = policy.conditioner.coefficients(rollout.preference[:1])[0]
    _, found = gradients(policy, rollout)
    names = {id(p): key for key, p in policy.trained_parameters().items()}
    by_copy = [{str(i): found[names[id(p)]] for i, p in enumerate(copy)} for copy in copies]
    assert float(c[0]) != float(c[1])
    scaled = [{k: g / c[i].item() for k, g in by_copy[i].items()} for i in range(2)]
    assert_same(scaled[0], scaled[1])


@pytest.mark.parametrize("name", ["full", "logits", "soft prompt", "soft prompt and LoRA", "text"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing(tiny_folder: Callable[..., Path], kind: str, name: str) -> None:
    results = []
    for checkpointing in (False, True):
        policy = build_policy(
            double(tiny_folder(kind)),
            CONDITIONERS[name](),
            perturb=0.02,
            gradient_checkpointing=checkpointing,
        )
        groups = 3 if policy.conditioner.why_not_rows() is None else 1
        results.append(gradients(policy, rollout_of(policy, groups=groups))[1])
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    ("name", "groups"), [("full", 1), ("soft prompt", 1), ("text", 1), ("attention", 3)]
)
def test_checkpointing_merges_once(
    tiny_folder: Callable[..., Path], name: str, groups: int
) -> None:
    """The recomputation sees the very tensors of the forward; merging per block would be slow."""
    policy = build_policy(
        tiny_folder("llama"), CONDITIONERS[name](), perturb=0.02, gradient_checkpointing=True
    )
    batch = prompt_batch(PROMPTS[:groups])
    assert batch.preference is not None
    batch.preference.alpha.fill_(0.2)
    rollout = TransformersEngine().generate(policy, batch, 2, Sampling(8))
    layer = policy.model.model.layers[0].mlp.up_proj
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    logp.sum().backward()
    assert len(seen) == 2 and seen[0] is seen[1]
    assert isinstance(layer.weight, torch.nn.Parameter)  # the base is back


UP = "model.layers.0.mlp.up_proj.weight"


def test_a_fixed_preference_is_merged_once(tiny_folder: Callable[..., Path]) -> None:
    """For all tokens and rows of a rollout, and for both passes over what it sampled."""
    policy = build_policy(tiny_folder("llama"), Mixture("full"), perturb=0.02)
    policy.share_prompts = True
    weights = torch.tensor([[0.3, 0.7]]).expand(len(PROMPTS), -1)
    batch = prompt_batch(PROMPTS, Preference(weights, torch.full((len(PROMPTS),), 0.2)))
    seen: list[Tensor] = []  # which keeps them, so that none is made anew at an old place
    layer = policy.model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    rollout = TransformersEngine().generate(policy, batch, 2, Sampling(8))
    assert len(seen) > 2 and all(weight is seen[0] for weight in seen)
    seen.clear()
    with policy.conditioned(rollout.preference):
        policy.logprobs(rollout)
    assert len(seen) > 1 and all(weight is seen[0] for weight in seen)
    torch.testing.assert_close(seen[0], policy.conditioner.fold(batch.preference[:1])[UP])


@pytest.mark.parametrize(
    ("kind", "endings"),
    [
        ("t5", ["shared/weight", "relative_attention_bias/weight", "layer_norm/weight", "/wo/"]),
        ("t5_v1_1", ["shared/weight", "lm_head/weight", "relative_attention_bias/weight"]),
        ("gpt2", ["wte/weight", "wpe/weight", "ln_f/weight", "ln_f/bias", "c_attn/bias"]),
        ("llama", ["embed_tokens/weight", "lm_head/weight", "model/norm/weight"]),
        ("gemma3", ["embed_tokens/weight", "q_norm/weight", "post_feedforward_layernorm/weight"]),
    ],
)
def test_full_moves_every_table(
    tiny_folder: Callable[..., Path], kind: str, endings: list[str]
) -> None:
    policy = build_policy(double(tiny_folder(kind)), Mixture("full"), perturb=0.02)
    deltas = policy.conditioner.deltas[0]
    assert sum(p.numel() for p in deltas.values()) == policy.model.num_parameters()
    assert all(any(ending in key for key in deltas) for ending in endings)
    _, found = gradients(policy, rollout_of(policy, groups=1))
    still = [key for key, gradient in found.items() if not gradient.any()]
    assert not still


def test_coefficients_belong_to_the_outer_conditioner() -> None:
    with pytest.raises(ValueError, match="give them to SoftPrompt, not to LoRA"):
        SoftPrompt(LoRA(coefficients=Scaled(shared="constant")))


@pytest.mark.parametrize("name", VANISHING)
def test_one_reward_and_many_alphas(tiny_folder: Callable[..., Path], name: str) -> None:
    policy = Policy(double(tiny_folder("llama")), CONDITIONERS[name]())
    policy.build(["only"])
    for parameter in policy.trained_parameters().values():
        parameter.data.normal_(std=0.05)
    preference = Preference(torch.ones(3, 1), torch.tensor([0.1, 0.5, 0.9]))
    batch = prompt_batch(["hello"] * 3, preference)
    rollout = TransformersEngine().generate(policy, batch, 1, Sampling(4))
    same = rollout.response_ids[:1].expand(3, -1)
    rollout = replace(rollout, response_ids=same, response_mask=torch.ones_like(same).bool())
    logp, by_row = gradients(policy, rollout)
    alone = [gradients(policy, rollout.select(torch.tensor([row]))) for row in range(3)]
    torch.testing.assert_close(logp, torch.cat([a[0] for a in alone]), atol=1e-5, rtol=1e-5)
    assert_same(by_row, {key: sum((a[1][key] for a in alone), torch.zeros(())) for key in by_row})
    assert (logp[0] - logp[2]).abs().max() > 1e-3  # alpha is the dial
