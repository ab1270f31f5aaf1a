"""Rows of like length are run together; the whole batch in one pass says the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
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
    PromptText,
    Rollout,
    Sampling,
    SoftPrompt,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner
from clp_lightning.policy import lengths
from clp_lightning.policy.lengths import cut
from tests.helpers import PROMPTS, build_policy, prompt_batch

CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "lora": lambda: LoRA(rank=2, shared_rank=2),
    "gate": lambda: LoRA(rank=2, shared_rank=2, coefficients=Gate()),
    "rows": lambda: Mixture(mixing="row"),
    "text": lambda: PromptText(rest=LoRA(shared_rank=2)),
    "soft": lambda: SoftPrompt(rest=LoRA(shared_rank=2)),
}


def sampled(policy: Policy, lengths: list[int] | None = None) -> Rollout:
    """Four responses to each prompt, cut to ``lengths``, by default from 1 to 12 in no order."""
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 4, Sampling(12))
    ends = torch.tensor(lengths or [7 * row % 12 + 1 for row in range(12)])
    mask = torch.arange(12) < ends[:, None]
    ids = torch.randint(6, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    return replace(rollout, response_ids=ids, response_mask=mask)


def read(policy: Policy, rollout: Rollout) -> list[Tensor]:
    """What the policy and the reference say where responses stand, and all gradients."""
    mask = rollout.response_mask
    weight = torch.linspace(-1, 1, mask.numel(), dtype=torch.float64).view(mask.shape)
    policy.zero_grad()
    with policy.conditioned(rollout.preference):
        logp = policy.logprobs(rollout)
        every = policy.log_distributions(rollout)
    (logp * weight)[mask].sum().backward()
    with policy.reference():
        ref = policy.logprobs(rollout)
    grads = [p.grad for p in policy.trained_parameters().values() if p.grad is not None]
    return [logp.detach()[mask], every.detach()[mask], ref[mask], *grads]


def count(policy: Policy) -> list[tuple[int, int]]:
    """Rows and positions of every pass through the first decoder block from now on."""
    calls: list[tuple[int, int]] = []
    inner = policy.model.get_decoder()
    block = inner.block[0] if hasattr(inner, "block") else inner.layers[0]
    block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("kind", "conditioner", "checkpointing"),
    [
        *((kind, "lora", on) for kind in ("llama", "gemma3", "t5") for on in (False, True)),
        *(("llama", name, False) for name in CONDITIONERS if name != "lora"),
    ],
)
def test_bundles_change_nothing(
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    conditioner: str,
    checkpointing: bool,
    share: bool,
) -> None:
    policy = build_policy(
        tiny_folder(kind),
        CONDITIONERS[conditioner](),
        perturb=0.05,
        gradient_checkpointing=checkpointing,
    )
    policy.share_prompts = share
    rollout = sampled(policy)
    policy.double()
    asked = rollout.preference
    rollout.preference = Preference(asked.weights.double(), asked.alpha.double())
    calls = count(policy)
    whole = read(policy, rollout)
    passes = len(calls)
    monkeypatch.setattr(lengths, "_WORTH", {"cpu": (1, 0)})
    calls.clear()
    bundled = read(policy, rollout)
    assert len(calls) >= passes + 3  # both readings of log-probabilities are cut
    assert len(whole) == len(bundled) > 3
    for one, other in zip(bundled, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("share", [False, True])
def test_padding_is_not_computed(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    monkeypatch.setattr(lengths, "_WORTH", {"cpu": (15, 0)})
    policy = build_policy(tiny_folder("llama"))
    policy.share_prompts = share
    rollout = sampled(policy, [2, 12] * 6)
    prompts = rollout.prompt_mask.sum(-1)
    calls = count(policy)
    with policy.reference():
        policy.logprobs(rollout)
    # The last token of a response is not read. By rows the long prompts come apart as well.
    if share:
        assert calls == [(3, prompts.max()), (6, 1), (6, 11)]
    else:
        long = prompts.max()
        short = prompts[prompts < long].max()
        assert sorted(calls) == [(2, long + 1), (2, long + 11), (4, short + 1), (4, short + 11)]


def test_distributions_are_scored_in_one_piece(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "_WORTH", {"cpu": (1, 0)})
    policy = build_policy(tiny_folder("llama"))
    policy.share_prompts = False
    rollout = sampled(policy)
    calls = count(policy)
    with policy.reference():
        policy.log_distributions(rollout)
        assert len(calls) == 1
        policy.logprobs(rollout)
    assert len(calls) > 2


def test_the_end_of_a_batch_of_short_responses_is_not_computed(
    tiny_folder: Callable[..., Path],
) -> None:
    policy = build_policy(tiny_folder("llama"))
    rollout = sampled(policy, [3] * 12)
    calls = count(policy)
    with policy.reference():
        logp = policy.logprobs(rollout)
    assert calls == [(12, rollout.input_ids.shape[1] + 2)]
    assert logp.shape == rollout.response_ids.shape and not logp[:, 3:].any()


def test_nothing_is_cut_where_it_does_not_pay(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build_policy(tiny_folder("llama"))
    policy.share_prompts = True
    different, equal = sampled(policy), sampled(policy, [12] * 12)
    calls = count(policy)
    with policy.reference():
        policy.logprobs(different)  # of a tiny model, which saves next to nothing
        monkeypatch.setattr(lengths, "_WORTH", {"cpu": (1, 0)})
        policy.logprobs(equal)
        policy.cut_by_length = False  # as where devices share weights
        policy.logprobs(different)
    assert calls == [(3, 24), (12, 11)] * 3


def test_preferences_that_are_merged_by_row_keep_their_rows_together(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "_WORTH", {"cpu": (1, 0)})
    policy = build_policy(tiny_folder("llama"), Mixture(mixing="row"))
    policy.share_prompts = True
    rollout = sampled(policy, [1, 2, 3, 4, 9, 12, 1, 2, 5, 6, 1, 2])
    alike = replace(rollout, preference=rollout.preference[torch.zeros(12, dtype=torch.long)])
    calls = count(policy)
    for asked in (rollout, alike):
        with policy.conditioned(asked.preference):
            policy.logprobs(asked)
    assert calls[:4] == [(3, 24), (4, 3), (4, 5), (4, 11)]
    assert len(calls) > 8  # merged, where every row may go by itself


def test_cuts_are_the_best_there_are() -> None:
    """One cut saves as much as the best of all ways to divide the rows in two."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randint(1, 20, (7, 1), generator=draw)

        def area(numbers: list[int], rows: Tensor = rows) -> int:
            return len(numbers) * int(rows[numbers].max())

        everyone = list(range(7))
        best = min(
            area(list(some)) + area([row for row in everyone if row not in some])
            for size in range(1, 7)
            for some in combinations(everyone, size)
        )
        saved = area(everyone) - best
        parts = [part.tolist() for part in cut(rows, saved - 1)]
        assert sorted(row for part in parts for row in part) == everyone and len(parts) >= 2
        assert sum(map(area, parts)) <= best
        assert [part.tolist() for part in cut(rows, saved)] == [everyone]
