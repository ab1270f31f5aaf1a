"""An output layer that reads a few positions at a time: the same values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import spawn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
)

from clp_lightning import (
    LoRA,
    Mixture,
    Policy,
    Pretrained,
    PromptText,
    Sampling,
    TransformersEngine,
)
from clp_lightning.conditioning import Conditioner, Unconditioned
from clp_lightning.policy import policy as policy_module
from clp_lightning.policy.prefix import read_prompt
from clp_lightning.policy.readout import can_be_cut
from tests.helpers import PROMPTS, build_policy, prompt_batch
from tests.tiny import EOS, KINDS, PAD, VOCABULARY, tiny_model, tiny_tokenizer

CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "lora": lambda: LoRA(rank=2, shared_rank=2),
    "full": lambda: Mixture("full"),
    "full by row": lambda: Mixture("full", mixing="row"),
    "logits by row": lambda: Mixture("logits", mixing="row"),
    "prompt": PromptText,
}


def read(policy: Policy, one_preference: bool, sizes: list[int]) -> list[Tensor]:
    """Log-probabilities, the reference's, and all gradients."""
    batch = prompt_batch(PROMPTS)
    if one_preference:
        assert batch.preference is not None
        batch.preference = batch.preference[torch.zeros(len(batch), dtype=torch.long)]
    rollout = TransformersEngine().generate(policy, batch, 2, Sampling(7))
    head = policy.model.get_output_embeddings()
    vocabulary = policy.model.config.vocab_size

    def see(module: object, states: object, out: Tensor) -> None:
        if out.shape[-1] == vocabulary:  # and not the states that it passes on
            sizes.append(out.shape[1])

    hook = head.register_forward_hook(see)
    policy.zero_grad()
    with policy.conditioned(rollout.preference):
        own = policy.logprobs(rollout)
    with policy.reference():
        reference = policy.logprobs(rollout)
    hook.remove()
    (own * rollout.response_mask).sum().backward()
    grads = [p.grad for p in policy.trained_parameters().values() if p.grad is not None]
    return [own.detach()[rollout.response_mask], reference[rollout.response_mask], *grads]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("kind", "conditioner", "checkpointing"),
    [
        *((kind, "lora", False) for kind in KINDS),
        *((kind, name, True) for kind in ("llama", "t5") for name in ("lora", "full")),
        *(("llama", name, False) for name in CONDITIONERS),
    ],
)
def test_pieces_change_nothing(
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    conditioner: str,
    checkpointing: bool,
    share: bool,
) -> None:
    found: list[list[Tensor]] = []
    for many in (2**26, 0):
        monkeypatch.setattr(policy_module, "_MANY_LOGITS", many)
        monkeypatch.setattr(policy_module, "_PIECE", 6 * 2 * tiny_model(kind).config.vocab_size)
        policy = build_policy(
            tiny_folder(kind),
            CONDITIONERS[conditioner](),
            perturb=0.05,
            gradient_checkpointing=checkpointing,
        )
        policy.share_prompts = share
        sizes: list[int] = []
        found.append(read(policy, conditioner == "full", sizes))
        # The prompt's end and what follows, or the whole response; once for each of the two.
        assert (max(sizes) <= 2) == (many == 0)
    for pieces, whole in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=5e-5, rtol=1e-4)


def test_a_model_that_goes_on_in_float32_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.3}
    config = MambaConfig(vocab_size=len(VOCABULARY), pad_token_id=PAD, eos_token_id=EOS, **sizes)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = Pretrained(str(tmp_path), dtype="bfloat16")
    found = []
    for many in (2**26, 0):
        monkeypatch.setattr(policy_module, "_MANY_LOGITS", many)
        lora = LoRA(rank=2, targets=["in_proj"], shared_rank=0)
        policy = build_policy(base, lora, perturb=0.05)
        found.append(read(policy, False, []))
    assert policy._can_be_cut
    for pieces, whole in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-2, rtol=1e-2)


def test_a_policy_without_a_reference_is_cut_too(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build_policy(tiny_folder("llama"), Unconditioned())
    rollout = TransformersEngine().generate(policy, prompt_batch(PROMPTS), 2, Sampling(7))
    monkeypatch.setattr(policy_module, "_PIECE", 1)
    found = []
    for many in (2**26, 0):
        monkeypatch.setattr(policy_module, "_MANY_LOGITS", many)
        policy.zero_grad()
        with policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout)
        logp[rollout.response_mask].sum().backward()
        grads = [p.grad for p in policy.trained_parameters().values()]
        found.append([logp.detach()[rollout.response_mask], *grads])
    assert policy._can_be_cut
    torch.testing.assert_close(*found, atol=5e-5, rtol=1e-4)


def test_a_model_that_goes_on_behind_its_output_layer_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "_MANY_LOGITS", 0)
    for cap, cut in ((None, True), (5.0, False)):
        folder = tmp_path / str(cap)
        tiny_model("gemma3", final_logit_softcapping=cap).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        policy = build_policy(folder)
        read(policy, False, [])
        assert policy._can_be_cut is cut


def test_a_model_with_a_bias_behind_its_output_layer_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BartConfig(
        vocab_size=len(VOCABULARY),
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_attention_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = []
    for many in (2**26, 0):
        monkeypatch.setattr(policy_module, "_MANY_LOGITS", many)
        policy = build_policy(tmp_path, perturb=0.05)
        found.append(read(policy, False, []))
    assert policy._can_be_cut is False
    for cut, whole in zip(*found, strict=True):
        assert torch.equal(cut, whole)


def test_a_model_that_drops_columns_of_its_output_layer_is_not_cut(
    tiny_folder: Callable[..., Path],
) -> None:
    """As where a vocabulary is padded."""
    policy = build_policy(tiny_folder("llama"))
    ids = torch.ones(1, 2, dtype=torch.long)
    for dropped in (0, 3):

        def run(dropped: int = dropped) -> Tensor:
            logits = read_prompt(policy.model, ids, ids > 0).logits
            return logits[..., : len(VOCABULARY) - dropped]

        with policy.reference(), policy.rows(torch.tensor([0])):
            assert can_be_cut(policy.model, run) is not bool(dropped)


@pytest.mark.slow
def test_shards_are_cut_where_one_device_has_many_logits(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Devices that cut, which they ask by a forward, and others that do not would wait forever."""
    spawn(score_in_shards, (str(tmp_path), tiny_folder("llama")), nprocs=2)
    for rank in range(2):
        whole, pieces = torch.load(tmp_path / f"{rank}.pt")
        assert len(whole) > 2
        torch.testing.assert_close(pieces, whole, atol=5e-5, rtol=1e-4)


def score_in_shards(rank: int, folder: str, model: Path) -> None:
    """One response on one device and three on the other; whole, and cut above one."""
    store, patience = f"file://{folder}/store", timedelta(seconds=20)
    distributed.init_process_group("gloo", store, patience, rank=rank, world_size=2)
    policy = build_policy(model, Mixture("full", mixing="row"), perturb=0.05)
    policy.shard(init_device_mesh("cpu", (2,)))
    assert not policy.cut_by_length  # by its own lengths, which are others elsewhere
    policy_module._PIECE = 1
    found = []
    for many in (2**26, 2 * len(VOCABULARY) * 7 + 1):
        policy_module._MANY_LOGITS = many
        batch = prompt_batch(PROMPTS[: 1 + 2 * rank])
        rollout = TransformersEngine().generate(policy, batch, 2, Sampling(7))
        policy.zero_grad()
        with policy.conditioned(rollout.preference):
            logp = policy.logprobs(rollout)
        logp[rollout.response_mask].sum().backward()
        grads: list[Any] = [p.grad for p in policy.trained_parameters().values()]
        shared = [grad.full_tensor() for grad in grads if grad is not None]
        found.append([logp.detach()[rollout.response_mask], *shared])
    assert policy._can_be_cut
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
