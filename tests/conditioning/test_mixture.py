"""Full-rank and prompt conditioning: which parameters move, what is written into prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from clp_lightning import Mixture, Preference, Pretrained, Sampling, TransformersEngine
from clp_lightning.conditioning import Coefficients, Gate, rowwise
from clp_lightning.conditioning.base import Scope
from clp_lightning.conditioning.rowwise import embedding_scale, mixed_forward
from clp_lightning.functional.grouped import grouped_linear
from tests.helpers import PROMPTS, assert_alike, build_policy, prompt_batch


def test_what_is_conditioned(tiny_folder: Callable[..., Path]) -> None:
    tied = tiny_folder("gpt2")
    keep = build_policy(tied, Mixture("full")).conditioner
    assert len(keep.shared()) == 0
    assert sum("lm_head" in key or "wte" in key for key in keep.deltas[0]) == 1
    split = build_policy(tied, Mixture("logits")).conditioner
    assert list(split.deltas[0]) == ["lm_head/weight"]
    assert "transformer/wte/weight" in split.shared_delta
    frozen = build_policy(tied, Mixture("attention", rest="freeze")).conditioner
    assert len(frozen.shared()) == 0
    assert {key.split("/")[-2] for key in frozen.deltas[0]} == {"c_attn", "c_proj"}
    with pytest.raises(ValueError, match="matches no parameter"):
        build_policy(tied, Mixture(["q_proj"]))
    # Every pattern must match, not just one; a tied output layer goes by the table's name.
    for pattern in ("q_projj", "lm_head"):
        with pytest.raises(ValueError, match=rf"\['{pattern}'\] matches no parameter"):
            build_policy(tied, Mixture(["c_attn", pattern]))
    assert build_policy(tied, Mixture(["c_attn", "lm_head"], tied="split"))


def test_deltas_are_merged_into_a_bfloat16_base_with_one_rounding(
    tiny_folder: Callable[..., Path],
) -> None:
    spec = Pretrained(str(tiny_folder("llama")), dtype="bfloat16")
    conditioner = build_policy(spec, Mixture("full"), perturb=0.01).conditioner
    at = torch.tensor([0.3, 0.5, 0.8])
    merged = conditioner.fold_at(at)
    for name, weight in conditioner._model.state_dict().items():
        key = name.replace(".", "/")
        deltas = [copy[key].double() for copy in conditioner.deltas]
        exact = weight.double() + 0.3 * deltas[0] + 0.5 * deltas[1]
        half_a_step = exact.abs() * 2**-8 * (1 + 1e-5)
        assert merged[name].dtype == torch.bfloat16
        assert ((merged[name].double() - exact).abs() <= half_a_step).all(), name


def test_split_leaves_the_input_table_alone(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("gpt2"), Mixture("logits", rest="freeze"), perturb=0.1)
    state = policy.conditioner.fold(Preference.single([0.4, 0.6], 0.2))
    table = policy.model.transformer.wte.weight
    assert torch.equal(state["transformer.wte.weight"], table)
    assert not torch.equal(state["lm_head.weight"], table)


def test_merge_never_mixes_rows(tiny_folder: Callable[..., Path]) -> None:
    two = Preference(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0.1, 0.1]))
    for mixing in ("auto", "merge"):
        conditioner = build_policy(tiny_folder("llama"), Mixture(mixing=mixing)).conditioner
        assert conditioner.one_preference_per_batch
        if mixing == "auto":
            with conditioner.rows(two):
                assert len(conditioner.scope.coefficients) == 2
        else:
            with pytest.raises(ValueError, match="mixing is 'merge'"):
                conditioner.rows(two)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # linear layers, and Conv1D ones
@pytest.mark.parametrize("targets", ["full", "attention"])
@pytest.mark.parametrize("alike", [True, False])
def test_groups_of_rows_may_be_merged(
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    targets: str,
    alike: bool,
) -> None:
    policy = build_policy(tiny_folder(kind), Mixture(targets, mixing="row"), perturb=0.05)
    batch = prompt_batch(["ab", "hello", "one more"])
    rollout = TransformersEngine().generate(policy, batch, 2, Sampling(6))
    if not alike:  # a response was dropped
        rollout = rollout.select(torch.tensor([0, 1, 2, 4, 5]))
    merges, found = 0, []

    def watched(*args: Any) -> Any:
        nonlocal merges
        merges += 1
        return grouped_linear(*args)

    monkeypatch.setattr(rowwise, "grouped_linear", watched)
    for positions in (10**9, 1):
        monkeypatch.setattr(rowwise, "_WORTH_MERGING", {"cpu": positions})
        policy.zero_grad()
        with policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout)
        logp[rollout.response_mask].sum().backward()
        grads = [p.grad for p in policy.trained_parameters().values() if p.grad is not None]
        found.append([logp.detach()[rollout.response_mask], *grads])
        assert (merges > 0) == (positions == 1 and alike)
    for merged, mixed in zip(*found, strict=True):
        torch.testing.assert_close(merged, mixed, atol=1e-4, rtol=1e-4)


def test_learned_coefficients_keep_their_gradient(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowwise, "_WORTH_MERGING", {"cpu": 1})
    conditioner = Mixture("attention", mixing="row", coefficients=Gate())
    policy = build_policy(tiny_folder("llama"), conditioner, perturb=0.05)
    rollout = TransformersEngine().generate(policy, prompt_batch(["ab", "hello"]), 2, Sampling(4))
    with policy.conditioned(rollout.preference):
        policy.logprobs(rollout).sum().backward()
    assert any(
        p.grad is not None and bool(p.grad.any()) for p in conditioner.coefficients.parameters()
    )


def test_decoding_with_weights_merged_for_each_preference(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a preference has many rows."""
    policy = build_policy(tiny_folder("llama"), Mixture(), perturb=0.05)
    calls, rollouts = [], []

    def grouped(x: Tensor, *others: Any) -> Tensor:
        calls.append(x.shape[:2])
        return grouped_linear(x, *others)

    monkeypatch.setattr(rowwise, "grouped_linear", grouped)
    for worth in (1, 2**20):
        monkeypatch.setattr(rowwise, "_WORTH_MERGING", {"cpu": worth})
        engine = TransformersEngine()
        rollouts.append(engine.generate(policy, prompt_batch(PROMPTS), 2, Sampling(6)))
    assert (6, 1) in calls  # two responses to each of three prompts
    assert_alike(*rollouts)


class Centred(Coefficients):
    def copies(self, preference: Preference) -> Tensor:
        return (1 - preference.alpha.unsqueeze(-1)) * (preference.weights - 1 / 3)


def test_coefficients_that_cancel_out_are_mixed_as_they_are(
    tiny_folder: Callable[..., Path],
) -> None:
    """Their sum is rounding, alike in all rows; the base weight must not be divided by it."""
    conditioner = Mixture(coefficients=Centred())
    policy = build_policy(tiny_folder("llama"), conditioner, 0.05, names=["a", "b", "c"])
    corners = Preference(torch.eye(3), torch.full((3,), 0.1))
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS, corners), 2, Sampling(6))
    assert rollout.logp is not None
    for row, mask in enumerate(rollout.response_mask):
        with policy.conditioned(rollout.preference[row : row + 1]), torch.no_grad():
            merged = policy.logprobs(rollout.select(torch.tensor([row])))
        torch.testing.assert_close(rollout.logp[row][mask], merged[0][mask])


def test_sums_that_differ_in_bfloat16_s_last_places_are_not_alike() -> None:
    """Or the base weight of one row would be 2 % too small for another."""
    for other, expected in ((0.48, 0.0), (0.5, 0.95)):
        factors = torch.tensor([[0.95, 0.0], [0.45, other]])
        found = rowwise._common_sum(Scope(factors), factors, (0, 1), torch.bfloat16)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_table_is_scaled_as_the_model_scales_it(dtype: torch.dtype) -> None:
    table = Gemma3TextScaledWordEmbedding(9, 8, 0, embed_scale=5.7).to(dtype)
    scope = Scope(torch.tensor([[0.3, 0.7], [0.5, 0.5]]))
    mixed = {"weight": ([torch.zeros(9, 8)] * 2, [0, 1])}
    ids = torch.arange(2, 8).view(2, 3)
    assert torch.equal(mixed_forward(table, mixed, scope, ids), table(ids))


def test_scales_of_tables() -> None:
    assert embedding_scale(nn.Embedding(3, 2)) == 1
    assert embedding_scale(BartScaledWordEmbedding(3, 2, 0, embed_scale=4.0)) == 4
