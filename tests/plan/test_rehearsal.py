"""The arithmetic of a plan, by paper and pencil."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clp_lightning import LoRA
from clp_lightning.conditioning import Mixture
from clp_lightning.plan import Ledger, Load, rehearse
from tests.runs import make_module

PROMPTS, SAMPLES, LENGTH, NEW = 2, 3, 16, 5
LAYERS, KV_HEADS, HEAD = 2, 2, 8  # of the tiny Llama
ROOM = 32  # tokens that a cache keeps free


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


def test_a_longer_step_takes_more_and_checkpointing_less(tiny_folder: Callable[..., Path]) -> None:
    def activations(length: int, **options: object) -> int:
        module = make_module(tiny_folder(), conditioner=LoRA(rank=2), **options)
        return rehearse(module, Load(PROMPTS, length))["gradient"]["activations"]

    short, long = activations(32), activations(64)
    assert short < long < 2.1 * short
    assert activations(64, gradient_checkpointing=True) < long * 2 / 3


def base_parameters(base: Path) -> list[torch.nn.Parameter]:
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(base).parameters())
