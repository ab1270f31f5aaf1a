"""Four ways to the same log-probability: sampler, training pass, reference pass, and a single
unpadded row through plain Transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from clp_lightning import (
    MOD,
    Mixture,
    Policy,
    Pretrained,
    Rollout,
    Sampling,
    TransformersEngine,
)
from clp_lightning.policy import policy as policy_module
from clp_lightning.policy import scoring
from tests.helpers import PROMPTS, build_policy, prompt_batch
from tests.tiny import KINDS


def plain_logprobs(folder: Path, policy: Policy, rollout: Rollout, row: int) -> Tensor:
    """One row, no padding, no cache, nothing of ours but the folded weights."""
    prompt = rollout.input_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][rollout.response_mask[row]]
    seq2seq = policy.model.config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    state = policy.conditioner.fold(rollout.preference[row : row + 1])
    if not torch.equal(state["lm_head.weight"], model.lm_head.weight):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untie
    model.load_state_dict(state)
    with torch.no_grad():
        if seq2seq:
            start = torch.tensor([model.config.decoder_start_token_id])
            decoder = torch.cat([start, response[:-1]])[None]
            logits = model(input_ids=prompt[None], decoder_input_ids=decoder).logits[0]
        else:
            logits = model(torch.cat([prompt, response[:-1]])[None]).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_passes_agree(tiny_folder: Callable[..., Path], kind: str) -> None:
    folder = tiny_folder(kind)
    policy = build_policy(folder, perturb=0.1)
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 3, Sampling(12))
    mask = rollout.response_mask
    with policy.conditioned(rollout.preference):
        policy.share_prompts = False
        full = policy.logprobs(rollout)
        policy.share_prompts = True
        training = policy.logprobs(rollout)
        every = policy.log_distributions(rollout)  # (B, T, V)
    ids = rollout.response_ids.unsqueeze(-1)
    torch.testing.assert_close(every.gather(-1, ids).squeeze(-1), training)
    torch.testing.assert_close(every.logsumexp(-1)[mask], torch.zeros_like(training[mask]))
    assert rollout.logp is not None
    assert training.requires_grad
    torch.testing.assert_close(rollout.logp[mask], training[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(full[mask], training[mask], atol=1e-4, rtol=0)
    for row in range(len(rollout)):
        plain = plain_logprobs(folder, policy, rollout, row)
        torch.testing.assert_close(training[row][mask[row]], plain, atol=1e-4, rtol=0)


def test_prompts_are_shared_where_it_pays(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    for name in ("score_shared", "score_full"):
        score = getattr(policy_module, name)
        monkeypatch.setattr(
            policy_module,
            name,
            lambda *a, n=name, f=score, **k: chosen.append(n) or f(*a, **k),
        )
    policy = build_policy(tiny_folder(KINDS[0]))
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 3, Sampling(4))
    with policy.reference():
        few = policy.logprobs(rollout)
        monkeypatch.setattr(scoring, "_WORTH_SHARING", 1)
        many = policy.logprobs(rollout)
    assert chosen == ["score_full", "score_shared"]
    mask = rollout.response_mask
    torch.testing.assert_close(few[mask], many[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_pass_is_the_base(tiny_folder: Callable[..., Path], kind: str) -> None:
    folder = tiny_folder(kind)
    policy = build_policy(folder, perturb=0.1)
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(12))
    with policy.reference():
        reference = policy.logprobs(rollout)
    assert not reference.requires_grad
    bare = build_policy(folder)  # its copies are still zero
    for row in range(len(rollout)):
        plain = plain_logprobs(folder, bare, rollout, row)
        got = reference[row][rollout.response_mask[row]]
        torch.testing.assert_close(got, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_step_zero_is_the_reference_for_every_preference(
    tiny_folder: Callable[..., Path], kind: str
) -> None:
    policy = build_policy(tiny_folder(kind))
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(12))
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    with policy.reference():
        reference = policy.logprobs(rollout)
    torch.testing.assert_close(logp, reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_row_equals_merged(tiny_folder: Callable[..., Path], kind: str) -> None:
    """A different preference in every row, against each preference on its own."""
    policy = build_policy(tiny_folder(kind), perturb=0.1)
    batch = prompt_batch(PROMPTS)
    rollout = TransformersEngine().generate(policy, batch, 2, Sampling(12))
    parameters = policy.trained_parameters()

    def gradients(rows: Rollout) -> tuple[Tensor, list[Tensor]]:
        with policy.conditioned(
            rows.preference if len(rows.groups.unique()) > 1 else rows.preference[:1]
        ):
            logp = policy.logprobs(rows) * rows.response_mask
        return logp, list(torch.autograd.grad(logp.sum(), list(parameters.values())))

    logp, by_row = gradients(rollout)
    merged = [torch.zeros_like(g) for g in by_row]
    for group in range(len(PROMPTS)):
        rows = rollout.groups == group
        alone, grads = gradients(rollout.select(rows))
        torch.testing.assert_close(logp[rows], alone, atol=1e-5, rtol=1e-5)
        merged = [m + g for m, g in zip(merged, grads, strict=True)]
    scale = max(float(g.abs().max()) for g in by_row)
    for name, a, b in zip(parameters, by_row, merged, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * scale, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(
    tiny_folder: Callable[..., Path], kind: str
) -> None:
    """Backward runs outside the scope, where the recomputation needs the forward's preference."""
    batch = prompt_batch(PROMPTS)
    results = []
    for checkpointing in (False, True):
        policy = build_policy(tiny_folder(kind), perturb=0.1, gradient_checkpointing=checkpointing)
        assert policy.model.training is checkpointing  # routers are noisy in train mode
        rollout = TransformersEngine().generate(policy, batch, 2, Sampling(12))
        with policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout)
        with policy.reference():
            policy.logprobs(rollout)  # another scope in between must not leak
        (logp * rollout.response_mask).sum().backward()
        grads = {name: p.grad for name, p in policy.trained_parameters().items()}
        results.append((rollout.response_ids, grads))
    assert torch.equal(results[0][0], results[1][0])
    scale = max(float(g.abs().max()) for g in results[0][1].values() if g is not None)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=name
        )


def test_outside_a_scope_it_raises(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(3))
    with pytest.raises(RuntimeError, match="outside a preference"):
        policy.logprobs(rollout)
    with pytest.raises(RuntimeError, match="outside a preference"):
        policy.model(input_ids=rollout.input_ids)


def test_autocast_on_the_cpu(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.1)
    rollout = TransformersEngine().generate(policy, prompt_batch(["ab", "hello"]), 2, Sampling(6))
    with torch.autocast("cpu", torch.bfloat16), policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    assert logp.dtype == torch.float32
    loss = logp.masked_fill(~rollout.response_mask, 0).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.trained_parameters().values())
    torch.testing.assert_close(logp[0], rollout.logp[0], atol=0.5, rtol=0)


def test_no_response_at_all(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    rollout = TransformersEngine().generate(policy, prompt_batch(["ab"]), 2, Sampling(6))
    nothing = rollout.select(torch.zeros(2, dtype=torch.bool))
    with policy.conditioned(nothing.preference):
        assert policy.logprobs(nothing).shape == (0, rollout.response_ids.shape[1])


def test_the_reference_reads_every_prompt_whatever_its_number(
    tiny_folder: Callable[..., Path],
) -> None:
    """A data loader of one's own may number its prompts otherwise, or not at all."""
    policy = build_policy(tiny_folder())
    policy.share_prompts = True
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(6))
    with policy.reference():
        expected = policy.logprobs(rollout)
        found = policy.logprobs(replace(rollout, prompt_ids=torch.zeros_like(rollout.prompt_ids)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_in_half_precision_the_untrained_policy_is_the_reference(
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: bool,
    autocast: bool,
    n: int,
) -> None:
    """What is told of a token by decoding is rounded otherwise, so it is left out.

    With checkpoints the policy is computed in whole, and so is the reference.
    """
    monkeypatch.setattr(scoring, "_WORTH_SHARING", 1)  # as of a model that is not tiny
    dtype = "float32" if autocast else "bfloat16"
    base = Pretrained(str(tiny_folder(initializer_range=0.3)), dtype=dtype)
    policy = build_policy(base, gradient_checkpointing=checkpoints)
    batch = prompt_batch([prompt for prompt in PROMPTS for _ in range(3)])  # under 3 preferences
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rollout = TransformersEngine().generate(policy, batch, n, Sampling(9))
        assert rollout.logp is None
        with policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout)
        with policy.reference():
            assert torch.equal(policy.logprobs(rollout), logp)
        assert torch.equal(TransformersEngine().logprobs(policy, rollout), logp)


@pytest.mark.parametrize("engine", [TransformersEngine(), MOD()])
def test_an_engine_tells_of_preferences_that_cannot_be_mixed(
    tiny_folder: Callable[..., Path], engine: TransformersEngine
) -> None:
    found = []
    for mixing in ("row", "merge"):
        policy = build_policy(tiny_folder(), Mixture(mixing=mixing), perturb=0.05)
        rollout = engine.generate(policy, prompt_batch(PROMPTS), 2, Sampling(6))
        found.append(engine.logprobs(policy, rollout)[rollout.response_mask])
        assert rollout.logp is not None
        torch.testing.assert_close(found[-1], rollout.logp[rollout.response_mask].to(found[-1]))
        assert not len(engine.logprobs(policy, rollout.select(torch.tensor([], dtype=torch.long))))
    torch.testing.assert_close(*found)


def test_of_a_config_that_tells_nothing_of_its_layers(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for _ in range(2):
        policy = build_policy(tiny_folder())
        rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(6))
        with policy.conditioned(rollout.preference):
            found.append(policy.logprobs(rollout))
        monkeypatch.setattr("clp_lightning.policy.cache.DynamicCache", lambda config: config.absent)
    assert torch.equal(*found)
