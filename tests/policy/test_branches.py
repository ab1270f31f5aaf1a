"""Responses that share the keys and values of their prompt, beside copies for every response."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clp_lightning import LoRA, Policy, Pretrained, Rollout, Sampling, TransformersEngine
from clp_lightning.policy import branches
from clp_lightning.policy.branches import Branches
from tests.helpers import PROMPTS, build_policy, prompt_batch
from tests.tiny import OWN_ATTENTION

FAMILIES = ["llama", "gpt2", "qwen3"]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Branches]:
    """The caches that were made."""
    found: list[Branches] = []
    initialise = Branches.__init__

    def counted(self: Branches, *args: object) -> None:
        initialise(self, *args)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(Branches, "__init__", counted)
    return found


def sampled(policy: Policy, share: bool | None, n: int = 4, **settings: float) -> Rollout:
    policy.share_prompts = share
    sampling = Sampling(24, **settings)  # type: ignore[arg-type]
    return TransformersEngine().generate(policy, prompt_batch(PROMPTS), n, sampling)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_tokens(
    tiny_folder: Callable[..., Path], kind: str, temperature: float, begun: list[Branches]
) -> None:
    policy = build_policy(tiny_folder(kind), perturb=0.05)
    policy.stop_ids = list(range(0, 60, 4))  # rows end at all times, and with them prompts
    got, expected = (sampled(policy, share, temperature=temperature) for share in (True, False))
    assert len(begun) == 1
    assert len(set(expected.response_mask.sum(-1).tolist())) > 1
    assert torch.equal(got.response_ids, expected.response_ids)
    torch.testing.assert_close(got.logp, expected.logp, atol=1e-5, rtol=1e-5)


def test_prompts_that_all_have_ended_are_left_out(
    tiny_folder: Callable[..., Path], begun: list[Branches]
) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.05)
    policy.stop_ids = list(range(0, 60, 3))
    sampled(policy, True)
    assert len(begun[0]._hidden) < len(PROMPTS)
    assert all(len(keys) == len(begun[0]._hidden) for keys, _ in begun[0]._prompts)


@torch.no_grad()
def test_a_response_that_ends_at_once(tiny_folder: Callable[..., Path]) -> None:
    """Rows are dropped before anything was said."""
    policy = build_policy(tiny_folder("llama"), perturb=0.05)
    expected = sampled(policy, False)
    policy.stop_ids = expected.response_ids[:4, 0].unique().tolist()
    got, expected = sampled(policy, True), sampled(policy, False)
    assert torch.equal(got.response_ids, expected.response_ids)
    assert (expected.response_mask.sum(-1) == 1).any()


def test_grouped_heads(tiny_folder: Callable[..., Path], begun: list[Branches]) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.05)
    config = policy.model.config
    assert config.num_key_value_heads < config.num_attention_heads
    torch.testing.assert_close(sampled(policy, True).logp, sampled(policy, False).logp)
    assert begun


@pytest.mark.parametrize(
    ("length", "n", "expected"), [(40, 2, True), (40, 1, False), (12, 2, False)]
)
def test_long_prompts_of_several_responses_are_shared(
    tiny_folder: Callable[..., Path],
    begun: list[Branches],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    n: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(branches, "_LONG", 20)
    policy = build_policy(tiny_folder("llama"))
    batch = prompt_batch(["a" * length])
    TransformersEngine().generate(policy, batch, n, Sampling(4))
    assert bool(begun) is expected


@pytest.mark.parametrize("kind", ["gemma3", "t5"])
def test_models_that_cannot_share(
    tiny_folder: Callable[..., Path], begun: list[Branches], kind: str
) -> None:
    """A window forgets; relative positions need a bias."""
    sampled(build_policy(tiny_folder(kind)), True)
    assert not begun


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_models_that_would_say_something_else_do_not_share_of_themselves(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(branches, "_LONG", 2)
    lora = LoRA(rank=2, shared_rank=2, shared_targets="attention")
    policy = build_policy(tiny_folder(kind), lora, perturb=0.05)
    for parameter in policy.model.parameters():
        if parameter.ndim == 1:  # what Doge adds is 0 in a new model
            parameter.data.add_(torch.linspace(-1, 1, len(parameter)))
    got, expected = sampled(policy, None), sampled(policy, False)
    assert branches._SAME[policy.model] is False
    assert torch.equal(got.response_ids, expected.response_ids)
    assert torch.equal(got.logp, expected.logp)
    with pytest.raises((ValueError, RuntimeError)):
        sampled(policy, True)


def test_the_question_is_no_prompt_that_a_stem_was_seen_to_read(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "_LONG", 2)
    policy = build_policy(tiny_folder("llama"), LoRA(rank=2, last_blocks=1, shared_rank=0))
    first, second = sampled(policy, None), sampled(policy, None)
    assert policy.model in branches._SAME
    assert first.stem is not None and second.stem is not None
    assert all(a.prompt.equal(b.prompt) for a, b in zip(first.stem, second.stem, strict=True))


@pytest.mark.parametrize(
    ("dtype", "factor", "same"),
    [
        ("float32", 1.0, True),
        ("float32", 1.01, False),
        ("bfloat16", 1.0, True),
        ("bfloat16", 1.5, False),
    ],
)
def test_what_a_model_says_decides_and_not_that_it_says_something(
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    factor: float,
    same: bool,
) -> None:
    monkeypatch.setattr(branches, "_LONG", 2)
    right = Branches.attend
    monkeypatch.setattr(Branches, "attend", lambda self, *args: right(self, *args) * factor)
    base = Pretrained(str(tiny_folder("llama", initializer_range=0.3)), dtype=dtype)
    policy = build_policy(base, perturb=0.05)
    shared, apart = sampled(policy, None), sampled(policy, False)
    assert branches._SAME[policy.model] is same
    assert same or torch.equal(shared.response_ids, apart.response_ids)


def test_attention_that_does_not_see_the_prompts_is_refused(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose layers take no attention from Transformers' interface (DiffLlama's do not)."""
    policy = build_policy(tiny_folder("llama"))
    layer: Any = policy.model.model.layers[1].self_attn
    forward = layer.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        name, layer.config._attn_implementation = layer.config._attn_implementation, "sdpa"
        try:
            return forward(*args, **kwargs)
        finally:
            layer.config._attn_implementation = name

    monkeypatch.setattr(layer, "forward", own)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has an.*share_prompts = False"):
        sampled(policy, True)


def test_attention_with_more_than_a_scale_is_refused(tiny_folder: Callable[..., Path]) -> None:
    attention = build_policy(tiny_folder("llama")).model.model.layers[0].self_attn
    states = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"softcap.*share_prompts = False"):
        branches._attend(attention, states, states, states, None, softcap=30.0)
    with pytest.raises(ValueError, match=r"attention_mask.*share_prompts = False"):
        branches._attend(attention, states, states, states, torch.zeros(1, 1, 1, 1))


def test_the_model_is_left_as_it_was(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"), perturb=0.05)
    rollout = sampled(policy, True)
    assert policy.model.config._attn_implementation == "sdpa"
    assert rollout.logp is not None
    scored = TransformersEngine().logprobs(policy, rollout).masked_fill(~rollout.response_mask, 0)
    torch.testing.assert_close(scored, rollout.logp, atol=1e-5, rtol=1e-5)
