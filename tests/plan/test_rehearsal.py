"""The arithmetic of a plan, by paper and pencil."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from clp_lightning import ClassifierHead, LoRA, TransformersEngine
from clp_lightning.conditioning import Mixture
from clp_lightning.plan import (
    Gathered,
    Layout,
    Ledger,
    Load,
    gathered_bytes,
    on_each_device,
    rehearse,
)
from tests.rewards.classifiers import save_classifier
from tests.runs import make_module

PROMPTS, SAMPLES, LENGTH, NEW = 2, 3, 16, 5
LAYERS, KV_HEADS, HEAD = 2, 2, 8  # of the tiny Llama
ROOM = 32  # tokens that a cache keeps free


def test_a_peak_is_one_of_a_device() -> None:
    def work(ledger: Ledger) -> None:
        with ledger.part("base"):
            a = torch.empty(10, device="meta")
        del a
        torch.empty(5, device="meta")

    for shares, peak in (({}, {"base": 40}), ({"base": 4}, {"base": 0, "activations": 20})):
        ledger = Ledger(shares)
        with ledger:
            assert ledger.peak_of(partial(work, ledger)) == peak


def test_the_ledger_counts_storages_while_they_live() -> None:
    ledger = Ledger()

    def work() -> None:
        a = torch.empty(10, device="meta")  # 40 bytes
        with ledger.part("other"):
            b = a + 1
        view = b[:3]
        del b  # the view keeps it
        a.add_(1)
        del a
        torch.empty(5, device="meta")
        del view

    with ledger:
        assert ledger.peak_of(work) == {"activations": 40, "other": 40}
    assert sum(ledger.now.values()) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_parts_of_a_step(tiny_folder: Callable[..., Path], checkpointing: bool) -> None:
    base = tiny_folder()
    size = 4 * sum(p.numel() for p in base_parameters(base))
    options = {"max_new_tokens": NEW, "gradient_checkpointing": checkpointing}
    module = make_module(base, conditioner=Mixture("full"), **options)
    phases = rehearse(module, Load(PROMPTS, LENGTH, one_preference=True))
    for parts in phases.values():
        assert 0 <= parts["base"] - size < 100  # and the frequencies of the rotary positions
        assert parts["deltas"] == 2 * size  # two rewards
        assert parts["gradients"] <= 2 * size
        assert 0 <= parts["optimizer"] - 4 * size < 1000  # two moments; steps are on the CPU
        assert parts["rewards"] == 0
    assert phases["sampling"]["gradients"] == 2 * size  # of the step before
    assert phases["sampling"]["merged copy"] == size
    assert phases["update"]["merged copy"] == 0
    rows, tokens = PROMPTS * SAMPLES, LENGTH + NEW - 1 + ROOM
    cache = 4 * 2 * LAYERS * KV_HEADS * HEAD * rows * tokens  # keys and values
    assert phases["sampling"]["KV cache"] == cache


def test_sampling_in_chunks_needs_less_cache(tiny_folder: Callable[..., Path]) -> None:
    def cache(**options: object) -> int:
        module = make_module(tiny_folder(), max_new_tokens=NEW, rollout_batches=2, **options)
        return rehearse(module, Load(PROMPTS, LENGTH))["sampling"]["KV cache"]

    assert cache(rollout_chunks=2) == cache() / 2


def test_a_longer_step_takes_more_and_checkpointing_less(tiny_folder: Callable[..., Path]) -> None:
    def activations(length: int, **options: object) -> int:
        module = make_module(tiny_folder(), conditioner=LoRA(rank=2), **options)
        return rehearse(module, Load(PROMPTS, length))["gradient"]["activations"]

    short, long = activations(32), activations(64)
    assert short < long < 2.1 * short
    # Behind the prompts, which are computed once, every response has its own.
    few, many = (activations(4, samples_per_prompt=n, max_new_tokens=64) for n in (2, 4))
    assert 1.8 * few < many < 2.1 * few
    assert activations(64, gradient_checkpointing=True) < long * 2 / 3


def test_of_the_reference_nothing_is_kept_for_the_backward_pass(
    tiny_folder: Callable[..., Path],
) -> None:
    vocabulary, new = 4096, 32
    base = tiny_folder("llama", vocab_size=vocabulary)

    def activations(kl: str) -> int:
        module = make_module(base, kl=kl, max_new_tokens=new)
        return rehearse(module, Load(PROMPTS, LENGTH))["gradient"]["activations"]

    table = 4 * PROMPTS * SAMPLES * new * vocabulary  # log-probabilities of every token
    # The peak is in the forward pass of the vocabulary's form, while the reference's are there; if
    # they were kept for the backward pass, there would be one more.
    assert 2 * table < activations("vocabulary") - activations("response") < 2.5 * table


def test_what_the_stem_made_is_kept_from_sampling_to_scoring(
    tiny_folder: Callable[..., Path],
) -> None:
    def phases(share: bool, **options: object) -> dict[str, dict[str, int]]:
        conditioner = LoRA(rank=2, last_blocks=1)
        arguments = {"max_new_tokens": NEW, "rollout_batches": 2, **options}
        module = make_module(tiny_folder(), conditioner=conditioner, **arguments)
        module.policy.share_stem = share
        return rehearse(module, Load(PROMPTS, LENGTH))

    kept, not_kept = phases(True), phases(False)
    width = AutoConfig.from_pretrained(tiny_folder()).hidden_size
    states = 4 * width * 2 * PROMPTS * (LENGTH + SAMPLES * NEW)
    for phase in ("sampling", "gradient"):
        assert kept[phase]["activations"] - not_kept[phase]["activations"] == states
    assert kept["update"] == not_kept["update"]
    other = {"engine": TransformersEngine(precision="bf16")}
    assert phases(True, **other) == phases(False, **other)


def test_reward_models_count_where_they_stand_beside_the_policy(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(save_classifier(tmp_path / "head", "bert", ["score"]))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    rewards = {"head": ClassifierHead(folder), "elsewhere": ClassifierHead(folder, device="cpu")}
    phases = rehearse(make_module(tiny_folder(), rewards=rewards), Load(PROMPTS, LENGTH))
    assert phases["sampling"]["rewards"] == 4 * classifier.num_parameters()


def test_accumulation_keeps_gradients_and_generation_ahead_takes_more(
    tiny_folder: Callable[..., Path],
) -> None:
    def rehearsed(accumulate: int, ahead: int) -> dict[str, dict[str, int]]:
        base = tiny_folder("llama", num_hidden_layers=5)
        options = {"gradient_checkpointing": True, "rollout_batches": ahead}
        module = make_module(base, conditioner=Mixture("full"), **options)
        load = Load(PROMPTS, 64, accumulate=accumulate, one_preference=True)
        return rehearse(module, load)

    once, kept = rehearsed(1, 1), rehearsed(2, 2)
    # The most is alive before the merged weights pass their gradient on.
    assert once["gradient"]["gradients"] == 0
    assert kept["gradient"]["gradients"] == kept["gradient"]["deltas"]
    assert kept["sampling"]["KV cache"] == 2 * once["sampling"]["KV cache"]


def test_an_optimizer_that_updates_all_at_once_takes_more(
    tiny_folder: Callable[..., Path],
) -> None:
    def update(foreach: bool) -> dict[str, int]:
        module = make_module(tiny_folder(), conditioner=Mixture("full"))
        return rehearse(module, Load(PROMPTS, LENGTH, foreach=foreach))["update"]

    one_by_one, at_once = update(False), update(True)
    assert one_by_one["activations"] < at_once["deltas"] <= at_once["activations"]


def test_sharded_weights_are_mixed_and_gathered_block_by_block(
    tiny_folder: Callable[..., Path],
) -> None:
    layers = 5
    base = tiny_folder("llama", num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_pretrained(base)
    size = 4 * model.num_parameters()
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())

    def rehearsed(devices: int) -> tuple[dict[str, dict[str, int]], Gathered]:
        options = {"max_new_tokens": NEW, "gradient_checkpointing": True}
        module = make_module(base, conditioner=Mixture("full"), **options)
        load = Load(PROMPTS, LENGTH, one_preference=True, shard_group=devices)
        return rehearse(module, load), gathered_bytes(module.policy)

    (alone, _), (split, gathered) = rehearsed(1), rehearsed(4)
    for part in ("deltas", "gradients", "optimizer"):
        assert split["update"][part] == alone["update"][part]
    assert alone["sampling"]["merged copy"] == size > split["sampling"]["merged copy"] == 0
    # Two deltas beside every weight; of five blocks two are there at a time.
    whole = size - (layers - 2) * block
    assert gathered == Gathered(weights=3 * whole, gradients=2 * whole)
    phases = on_each_device(split, Layout(4, shard_group=4), gathered)
    for phase, held in (("sampling", 3 * whole), ("gradient", 5 * whole), ("update", 0)):
        assert phases[phase]["communication"] == held
        assert phases[phase]["deltas"] == -(-split[phase]["deltas"] // 4)


def base_parameters(base: Path) -> list[torch.nn.Parameter]:
    return list(AutoModelForCausalLM.from_pretrained(base).parameters())
