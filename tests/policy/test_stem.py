"""Blocks below the lowest conditioned one are computed once; every pass in whole says the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Preference,
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.policy.blocks import blocks
from clp_lightning.policy.stem import Stem
from clp_lightning.types import Prompt
from tests.helpers import NAMES, PROMPTS, assert_alike, build_policy, prompt_batch

LAST = [r"\.1\..*(q_proj|v_proj|down_proj)"]
CONDITIONERS: dict[str, tuple[Callable[[], Conditioner], int]] = {
    "lora": (lambda: LoRA(rank=2, shared_rank=2, shared_targets=LAST, targets=LAST), 1),
    "last block": (lambda: LoRA(rank=2, shared_rank=0, last_blocks=1), 1),
    "output too": (lambda: LoRA(rank=2, targets=[*LAST, "lm_head"], shared_rank=0), 1),
    "merged": (lambda: Mixture(LAST, rest="freeze"), 1),
    "rows": (lambda: Mixture(LAST, rest="freeze", mixing="row"), 1),
    "logits": (lambda: Mixture("logits", rest="freeze"), 2),
}
WITHOUT: dict[str, Callable[[], Conditioner]] = {
    "all blocks": lambda: LoRA(rank=2),
    "the rest is trained": lambda: Mixture("logits"),
    "the final norm": lambda: Mixture([r"^model\.norm"], rest="freeze"),
    "another prompt": lambda: PromptText(rest=LoRA(shared_rank=2)),
    "soft": lambda: SoftPrompt(rest=LoRA(shared_rank=2)),
}


def policy_of(folder: Path, make: Callable[[], Conditioner]) -> Policy:
    policy = build_policy(folder, make(), perturb=0.1)
    policy.stop_ids = list(range(6, 16))  # so that lengths differ
    policy.share_prompts = True  # as with every model that is not tiny
    return policy


def asked(policy: Policy) -> Preference:
    """Another in every row, where one forward can answer for several."""
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
    if policy.conditioner.one_preference_per_batch:
        weights = weights[1:2].expand(3, -1)
    return Preference(weights, torch.full((3,), 0.2))


def sampled(policy: Policy, n: int = 3) -> Rollout:
    batch = prompt_batch(PROMPTS, asked(policy))
    return TransformersEngine().generate(policy, batch, n, Sampling(9))


def read(policy: Policy, rollout: Rollout) -> list[Tensor]:
    """What the policy and the reference say where responses stand, and all gradients."""
    mask = rollout.response_mask
    policy.zero_grad()
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
    weight = torch.linspace(-1, 1, mask.numel(), dtype=logp.dtype).view(mask.shape)
    (logp * weight)[mask].sum().backward()
    with policy.reference():
        ref = policy.logprobs(rollout)
    grads = [p.grad for p in policy.trained_parameters().values() if p.grad is not None]
    assert grads
    return [logp[mask].detach(), ref[mask], *grads]


def calls(policy: Policy) -> list[int]:
    """Rows of every forward of the first block's attention, from now on."""
    seen: list[int] = []
    first: Any = next(blocks(policy.model))
    inside = next(m for name, m in first.named_modules() if name.endswith(("attn", "attention")))
    inside.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True
    )
    return seen


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_what_a_rollout_carries(tiny_folder: Callable[..., Path]) -> None:
    # `plan` counts as much (tests/plan/test_rehearsal.py).
    policy = policy_of(tiny_folder(), lambda: LoRA(2, last_blocks=1))
    policy.stop_ids = []
    rollout = sampled(policy)
    told = [states for each in rollout.stem for states in (each.prompt, each.response)]
    storages = {states.untyped_storage().data_ptr(): states.untyped_storage() for states in told}
    prompts = int(rollout.prompt_mask[::3].sum())
    width = policy.model.config.hidden_size
    assert sum(each.nbytes() for each in storages.values()) == 4 * width * (prompts + 9 * 9)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("llama", name) for name in CONDITIONERS), ("gpt2", "last block")]
)
def test_passes_that_begin_behind_the_stem_are_the_whole_ones(
    tiny_folder: Callable[..., Path], kind: str, name: str
) -> None:
    make, depth = CONDITIONERS[name]
    policy = policy_of(tiny_folder(kind), make)
    assert policy.stem is not None and len(policy.stem) == depth
    rollout = sampled(policy)
    assert rollout.stem is not None and len(set(rollout.lengths.tolist())) > 1
    seen = calls(policy)
    found = read(policy, rollout)
    assert not seen  # the stem was not run
    policy.share_stem = False
    assert_same(found, read(policy, rollout))
    assert seen


def test_one_response_to_each_prompt(tiny_folder: Callable[..., Path]) -> None:
    policy = policy_of(tiny_folder("llama"), CONDITIONERS["lora"][0])
    policy.share_prompts = None
    rollout = sampled(policy, 1)
    seen = calls(policy)
    found = read(policy, rollout)
    assert not seen
    policy.share_stem = False
    assert_same(found, read(policy, rollout))


@pytest.mark.parametrize("vocabulary", [2, 6])
def test_a_vocabulary_of_few_tokens(tiny_folder: Callable[..., Path], vocabulary: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    model.resize_token_embeddings(vocabulary)
    conditioner = LoRA(rank=2, targets=LAST, shared_rank=0)
    conditioner.attach_once(model, NAMES, 0)
    stem = Stem.of(model, conditioner)
    assert stem is not None and len(stem) == 1


def test_of_rollouts_in_parts_and_joined(tiny_folder: Callable[..., Path]) -> None:
    policy = policy_of(tiny_folder("llama"), CONDITIONERS["lora"][0])
    rollout = sampled(policy)
    parts = [rollout.select(torch.tensor(rows)) for rows in ([5, 1], [8, 2, 0])]
    joined = Rollout.cat(parts, pad_id=policy.pad_id, pad_prompts="left")
    seen = calls(policy)
    found = [read(policy, each) for each in [*parts, joined]]
    assert not seen
    policy.share_stem = False
    for mine, each in zip(found, [*parts, joined], strict=True):
        assert_same(mine, read(policy, each))


def test_other_tokens_are_read_anew(tiny_folder: Callable[..., Path]) -> None:
    """A rollout whose tokens somebody has replaced, and one of another policy."""
    policy = policy_of(tiny_folder("llama"), CONDITIONERS["lora"][0])
    other = policy_of(tiny_folder("llama", initializer_range=0.2), CONDITIONERS["lora"][0])
    rollout = sampled(policy)
    response = replace(rollout, response_ids=rollout.response_ids.roll(1, 0))
    prompt = replace(rollout, input_ids=rollout.input_ids.roll(3, 0))
    shorter = replace(rollout, response_mask=rollout.response_mask[:, :2].clone())
    shorter.response_ids = shorter.response_ids[:, :2]
    of_reference = replace(
        rollout,
        reference_input_ids=rollout.input_ids.roll(3, 0),
        reference_prompt_mask=rollout.prompt_mask.roll(3, 0),
    )
    changed = [response, prompt, shorter, of_reference]
    for policy_, each in [*((policy, each) for each in changed), (other, rollout)]:
        found = read(policy_, each)
        policy_.share_stem = False
        assert_same(found, read(policy_, each))
        policy_.share_stem = True


def test_the_same_tokens_in_other_rows_are_read_anew(tiny_folder: Callable[..., Path]) -> None:
    policy = policy_of(tiny_folder("llama"), CONDITIONERS["lora"][0])
    batch = prompt_batch(["a", "aaa"])
    rollout = TransformersEngine().generate(policy, batch, 1, Sampling(5))
    ids, mask = rollout.input_ids.flip(0), rollout.prompt_mask.flip(0)
    rollout = replace(rollout, input_ids=ids, prompt_mask=mask)
    found = read(policy, rollout)
    policy.share_stem = False
    assert_same(found, read(policy, rollout))


@pytest.mark.parametrize("name", WITHOUT)
def test_no_stem_where_a_preference_changes_it(tiny_folder: Callable[..., Path], name: str) -> None:
    policy = policy_of(tiny_folder("llama"), WITHOUT[name])
    assert policy.stem is None
    assert sampled(policy).stem is None


class Silent(LoRA):
    """Does not say what it changes."""

    def changed_layers(self) -> list[nn.Module] | None:  # type: ignore[override]
        return None


class Steering(LoRA):
    """Adds a vector below the adapters, of which it does not tell."""

    def attach(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        self.vector = nn.Parameter(torch.zeros(32))
        super().attach(model, names, seed)
        next(blocks(model)).register_forward_hook(lambda *call: self._moved(call[-1]))

    def _moved(self, states: Tensor) -> Tensor:
        return states if self.scope.coefficients is None else states + self.vector


class Rewriting(LoRA):
    """The policy reads another prompt than the reference."""

    rewrites = True

    def rewrite(self, prompt: Prompt, preference: Preference) -> Prompt:
        return str(prompt).upper()


@pytest.mark.parametrize("kind", [Silent, Steering, Rewriting])
def test_no_stem_where_a_conditioner_may_do_more(
    tiny_folder: Callable[..., Path], kind: type[LoRA]
) -> None:
    policy = policy_of(tiny_folder("llama"), lambda: kind(2, last_blocks=1, shared_rank=0))
    assert policy.stem is None
    rollout = sampled(policy)
    found = read(policy, rollout)
    policy.share_stem = False
    assert_same(found, read(policy, rollout))


@pytest.mark.parametrize("kind", ["gemma3", "t5"])  # a window; an encoder
def test_no_stem_of_such_models(tiny_folder: Callable[..., Path], kind: str) -> None:
    assert policy_of(tiny_folder(kind), lambda: LoRA(2, last_blocks=1)).stem is None


def below(tiny_folder: Callable[..., Path]) -> Policy:
    """Of three blocks, the last of them conditioned."""
    folder = tiny_folder("llama", num_hidden_layers=3)
    return policy_of(folder, lambda: LoRA(2, last_blocks=1, shared_rank=0))


def test_no_stem_of_blocks_that_are_read_past_the_next(tiny_folder: Callable[..., Path]) -> None:
    policy, kept = below(tiny_folder), list[Tensor]()
    stem = policy.stem
    assert stem is not None and len(stem) == 2
    first, _, last = blocks(policy.model)
    first.register_forward_hook(lambda *call: kept.append(call[-1]))
    last.register_forward_pre_hook(lambda _, args: (args[0] + kept.pop(), *args[1:]))
    policy._stem = None  # to be asked again
    assert policy.stem is None


def test_no_stem_of_trained_blocks_or_of_those_with_a_cache_of_their_own(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = below(tiny_folder)
    trained = list(blocks(policy.model))[1]
    trained.requires_grad_(True)
    stem = policy.stem
    assert stem is not None and len(stem) == 1
    monkeypatch.setattr("clp_lightning.policy.stem.DynamicCache", lambda config: config.absent)
    assert below(tiny_folder).stem is None


def test_what_is_recomputed_in_whole_is_so_for_both(tiny_folder: Callable[..., Path]) -> None:
    """Else the two would differ in half precision where they are the same network."""
    folder = tiny_folder("llama")
    policy = build_policy(folder, LoRA(2, last_blocks=1), gradient_checkpointing=True)
    assert policy.stem is None and sampled(policy).stem is None


class Corners(TransformersEngine):
    """Mixes the policy under the corners' preferences."""

    def voices(self, policy: Policy, preference: Preference) -> tuple[Preference, Tensor | None]:
        corners = torch.eye(2).repeat(len(preference), 1)
        return Preference(corners, preference.alpha.repeat_interleave(2)), preference.weights


def test_several_voices_have_no_states(tiny_folder: Callable[..., Path]) -> None:
    policy = below(tiny_folder)
    batch = prompt_batch(PROMPTS, asked(policy))
    assert Corners().generate(policy, batch, 2, Sampling(4)).stem is None


def test_copies_and_files_do_without(tiny_folder: Callable[..., Path]) -> None:
    rollout = sampled(below(tiny_folder))
    assert rollout.stem is not None
    for copied in (pickle.loads(pickle.dumps(rollout)), deepcopy(rollout)):
        assert copied.stem is None
        assert_alike(copied, rollout)


def test_nothing_is_left_behind_by_an_error(tiny_folder: Callable[..., Path]) -> None:
    policy = below(tiny_folder)
    assert policy.stem is not None

    def fails(rows: Tensor, tokens: Tensor) -> None:
        raise KeyError("while sampling")

    engine = TransformersEngine()
    engine.on_tokens = fails
    with pytest.raises(KeyError):
        engine.generate(policy, prompt_batch(PROMPTS), 2, Sampling(4))
    assert not any(
        block._forward_hooks or "forward" in vars(block) for block in blocks(policy.model)
    )


@pytest.mark.parametrize("name", ["lora", "output too", "rows", "logits"])
def test_prompts_that_are_alike_are_read_once_up_to_the_stems_end(
    tiny_folder: Callable[..., Path], name: str
) -> None:
    """A grid of preferences, as for a front."""
    policy = policy_of(tiny_folder("llama"), CONDITIONERS[name][0])
    weights = torch.linspace(0, 1, 8).repeat(2)
    grid = Preference(torch.stack([weights, 1 - weights], 1), torch.full((16,), 0.1))
    batch = prompt_batch([prompt for prompt in PROMPTS[:2] for _ in range(8)], grid)
    seen = calls(policy)
    found = TransformersEngine().generate(policy, batch, 2, Sampling(8))
    assert seen[0] == 2 and len(seen) > 1
    policy.share_stem = False
    seen.clear()
    assert_alike(found, TransformersEngine().generate(policy, batch, 2, Sampling(8)))
    assert seen[0] == 16


def test_what_is_sampled_with_less_precision_is_read_anew(
    tiny_folder: Callable[..., Path],
) -> None:
    policy = policy_of(tiny_folder("llama"), CONDITIONERS["lora"][0])
    batch = prompt_batch(PROMPTS, asked(policy))
    assert TransformersEngine(precision="bf16").generate(policy, batch, 2, Sampling(4)).stem is None
