"""Small pieces that several tests share."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from clp_lightning import LoRA, Policy, Preference, Pretrained, PromptBatch, Rollout
from clp_lightning.conditioning import Conditioner

NAMES = ["kind", "short"]


# Of different length, the last longer than Gemma's window of 8.
PROMPTS = ["ab", "hello", "a prompt past the window"]


def build_policy(
    folder: Path | Pretrained,
    conditioner: Conditioner | None = None,
    perturb: float = 0.0,
    names: list[str] = NAMES,
    **options: Any,
) -> Policy:
    """A policy on a tiny model; with ``perturb`` its copies are away from zero."""
    policy = Policy(
        folder if isinstance(folder, Pretrained) else str(folder),
        conditioner or LoRA(rank=2, shared_rank=2),
        **options,
    )
    policy.build(names, seed=0)
    if perturb:
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.trained_parameters().values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=perturb)
    return policy


def prompt_batch(prompts: list[Any], preference: Preference | None = None) -> PromptBatch:
    """Prompts numbered 0, 1, ..., each under its own preference."""
    if preference is None:
        share = torch.linspace(0.1, 0.8, len(prompts))
        preference = Preference(torch.stack([share, 1 - share], 1), share / 2)
    return PromptBatch(prompts, torch.arange(len(prompts)), preference=preference)


def assert_alike(found: Rollout, expected: Rollout) -> None:
    """Every field is the same, but how it was computed; numbers to rounding."""
    for f in fields(Rollout):
        if f.name == "stem":
            continue
        one, other = getattr(found, f.name), getattr(expected, f.name)
        if isinstance(one, Preference):
            assert one.alpha.equal(other.alpha)
            one, other = one.weights, other.weights
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, msg=lambda text, f=f: f"{f.name}: {text}")
        else:
            assert one == other, f.name
