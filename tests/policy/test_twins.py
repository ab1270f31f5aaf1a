"""Every fast path beside the slow one: Transformers' own calls on plain merged weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clp_lightning import LoRA, Mixture, Policy, Rollout, Sampling, TransformersEngine
from clp_lightning.conditioning import Conditioner
from clp_lightning.functional import linear
from clp_lightning.policy.sampling import sample_tokens
from tests.helpers import PROMPTS, build_policy, prompt_batch
from tests.tiny import KINDS, RECURRENT


def plain(folder: Path, policy: Policy, rollout: Rollout, row: int) -> Any:
    """Transformers' model with the weights that the preference of a row merges to."""
    auto = AutoModelForSeq2SeqLM if policy.model.config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    model.load_state_dict(policy.conditioner.fold(rollout.preference[row : row + 1]))
    return model


CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "full": lambda: Mixture("full"),
    "attention": lambda: Mixture("attention"),
    "lora": lambda: LoRA(rank=2, shared_rank=2),
    "all-linear": lambda: LoRA(rank=2, targets="all-linear"),
}


@pytest.mark.parametrize(
    ("kind", "conditioner", "early"),
    [
        *((kind, "full", early) for kind in KINDS for early in (False, True)),
        *(("llama", conditioner, True) for conditioner in CONDITIONERS if conditioner != "full"),
        *((kind, "all-linear", early) for kind in RECURRENT for early in (False, True)),
    ],
)
def test_greedy_tokens_are_those_of_generate(
    tiny_folder: Callable[..., Path], kind: str, conditioner: str, early: bool
) -> None:
    folder = tiny_folder(kind)
    policy = build_policy(folder, CONDITIONERS[conditioner](), perturb=0.05)
    greedy = Sampling(12, temperature=0)
    if early:  # every response to the first prompt stops at its third token
        first = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, greedy)
        policy.stop_ids = [int(first.response_ids[0, 2])]
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, greedy)
    assert not early or (rollout.lengths[:2] <= 3).all()
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=policy.pad_id,
        eos_token_id=list(policy.stop_ids),
        decoder_start_token_id=policy.model.config.to_dict().get("decoder_start_token_id"),
    )
    for row in range(len(rollout)):
        prompt = rollout.input_ids[row][rollout.prompt_mask[row]][None]
        found = plain(folder, policy, rollout, row).generate(prompt, generation_config=config)[0]
        found = found[1:] if policy.model.config.is_encoder_decoder else found[prompt.shape[1] :]
        ours = rollout.response_ids[row][rollout.response_mask[row]]
        assert ours.tolist() == found.tolist()


@pytest.mark.parametrize(
    ("settings", "warp"),
    [
        ({"temperature": 0.6}, TemperatureLogitsWarper(0.6)),
        ({"temperature": 1.7}, TemperatureLogitsWarper(1.7)),
        ({"top_p": 0.5}, TopPLogitsWarper(0.5)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
    ],
)
def test_the_sampler_tells_what_the_plain_model_says(
    tiny_folder: Callable[..., Path], settings: dict[str, Any], warp: LogitsProcessor
) -> None:
    folder = tiny_folder()
    policy = build_policy(folder, Mixture("full"), perturb=0.05)
    sampling = Sampling(8, **settings)
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, sampling)
    assert rollout.logp is not None
    for row, mask in enumerate(rollout.response_mask):
        with torch.no_grad():
            told = row_logprobs(plain(folder, policy, rollout, row), rollout, row, warp)
        torch.testing.assert_close(rollout.logp[row][mask], told, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, *RECURRENT])
def test_gradients_are_those_of_the_plain_model(
    tiny_folder: Callable[..., Path], kind: str, share: bool
) -> None:
    """d loss / d Delta_i = c_i d loss / d theta, docs/method.md, section 2."""
    folder = tiny_folder(kind)
    policy = build_policy(folder, Mixture("full"), perturb=0.05).double()
    batch = prompt_batch(PROMPTS)
    assert batch.preference is not None
    batch.preference = batch.preference[torch.ones(len(batch), dtype=torch.long)]
    rollout = TransformersEngine().generate(policy, batch, 2, Sampling(6))
    upstream = torch.randn(rollout.response_ids.shape, generator=torch.Generator().manual_seed(0))
    upstream = upstream.double().masked_fill(~rollout.response_mask, 0)
    policy.share_prompts = share
    with policy.conditioned(rollout.preference):
        (policy.logprobs(rollout) * upstream).sum().backward()

    model = plain(folder, policy, rollout, 0).double()
    model.load_state_dict(policy.conditioner.fold(rollout.preference[:1]))  # not rounded
    for row in range(len(rollout)):
        (
            row_logprobs(model, rollout, row) * upstream[row][rollout.response_mask[row]]
        ).sum().backward()
    coefficients = policy.conditioner.coefficients(rollout.preference[:1])[0]
    theirs = {name.replace(".", "/"): p.grad for name, p in model.named_parameters()}
    for c, copy in zip(coefficients, policy.conditioner.deltas, strict=False):
        for name, delta in copy.items():
            assert delta.grad is not None
            # Some families' norms compute in float32 whatever they are given, and recurrences too.
            atol, rtol = (2e-5, 1e-3) if kind in RECURRENT else (2e-6, 1e-4)
            torch.testing.assert_close(delta.grad, c * theirs[name], atol=atol, rtol=rtol)


def row_logprobs(
    model: Any, rollout: Rollout, row: int, warp: LogitsProcessor | None = None
) -> Tensor:
    """One row without padding or cache."""
    prompt = rollout.input_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][rollout.response_mask[row]]
    if model.config.is_encoder_decoder:
        start = torch.tensor([model.config.decoder_start_token_id])
        decoder = torch.cat([start, response[:-1]])[None]
        logits = model(input_ids=prompt[None], decoder_input_ids=decoder).logits[0]
    else:
        logits = model(torch.cat([prompt, response[:-1]])[None]).logits[0, len(prompt) - 1 :]
    if warp is not None:
        logits = warp(prompt[None], logits)
    logp: Tensor = logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
    return logp


@pytest.mark.parametrize("kind", RECURRENT)
def test_log_probabilities_where_layers_keep_a_state(
    tiny_folder: Callable[..., Path], kind: str
) -> None:
    """Of prompts that are padded, in scoring and in decoding; the reference's too."""
    folder = tiny_folder(kind)
    policy = build_policy(folder, CONDITIONERS["all-linear"](), perturb=0.05)
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(8))
    assert rollout.logp is not None and not rollout.prompt_mask.all()
    with policy.reference():
        of_reference = policy.logprobs(rollout)
    with torch.no_grad(), policy.conditioned(rollout.preference):
        of_policy = policy.logprobs(rollout)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, mask in enumerate(rollout.response_mask):
        with torch.no_grad():
            own = row_logprobs(plain(folder, policy, rollout, row), rollout, row)
            bare = row_logprobs(base, rollout, row)
        # Sums over the whole past, in float32.
        for ours, theirs in ((of_reference, bare), (of_policy, own), (rollout.logp, own)):
            torch.testing.assert_close(ours[row][mask], theirs, atol=5e-4, rtol=0)
        assert (own - bare).abs().max() > 0.01


def test_a_policy_by_the_faster_product(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's, though those of a tiny model are too small to be worth it."""
    own = sys.modules[linear.__module__]
    if not own._is_exact():  # there it is not taken: its way is, with torch's product
        monkeypatch.setattr(own, "_onednn", nullcontext)
    taken: set[int] = set()
    product = own._product

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.add(weight.data_ptr())
        return product(x, weight, bias)

    monkeypatch.setattr(own, "_product", noted)
    found = []
    for fast in (False, True):
        monkeypatch.setattr(own, "_helps", lambda fast=fast: fast)
        monkeypatch.setattr(own, "_WORTH", 1)
        policy = build_policy(tiny_folder(), LoRA(rank=2, shared_rank=2), perturb=0.05)
        rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(6))
        with policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout).masked_fill(~rollout.response_mask, 0)
        logp.sum().backward()
        grads = [p.grad for p in policy.trained_parameters().values() if p.grad is not None]
        found.append([rollout.response_ids, logp, *grads])
        layers = sum(isinstance(m, torch.nn.Linear) for m in policy.model.modules())
        assert len(taken) >= layers if fast else not taken
    for slow, quick in zip(*found, strict=True):
        torch.testing.assert_close(quick, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_sampler_draws_as_torch_multinomial(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, generator=draw)
    rows = logits.expand(20_000, -1)
    uniform = torch.rand(len(rows), generator=draw, dtype=torch.float64)
    ours = sample_tokens(rows, uniform, Sampling(temperature=temperature))[0]
    theirs = torch.multinomial((logits / temperature).softmax(-1), len(rows), True, generator=draw)
    counts = torch.stack([torch.bincount(t, minlength=40) for t in (ours, theirs)])
    counts = counts[:, counts.sum(0) >= 10]
    assert chi2_contingency(counts.numpy()).pvalue > 0.001
