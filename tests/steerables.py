"""Trained dials without training: tiny policies whose copies are away from zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clp_lightning import LoRA, Policy, Pretrained, SteerablePolicy
from clp_lightning.conditioning import Conditioner
from clp_lightning.described import describe
from clp_lightning.pretrained import fingerprint
from clp_lightning.steerable.trained import Trained
from tests.helpers import NAMES, build_policy

WEIGHTS = dict(zip(NAMES, [0.7, 0.3], strict=True))


def make_steerable(
    base: Path | Pretrained, conditioner: Conditioner | None = None, **options: Any
) -> SteerablePolicy:
    """As if a run had trained it.

    Args:
        base: A tiny model.
        conditioner: A LoRA if None.
        **options: Attributes of ``Trained``.
    """
    policy = build_policy(base, conditioner, perturb=0.05).eval()
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "rewards": NAMES,
        "statistics": {name: [0.5, 2.0] for name in NAMES},
        "alpha_range": [0.1, 0.6],
        "front": None,
    }
    trained = Trained(
        pretrained=policy.pretrained,
        fingerprint=fingerprint(policy.pretrained),
        conditioner=describe(policy.conditioner),
        encoding=describe(policy.encoding)["init_args"],
        temperature=policy.temperature,
        state={},
        **(settings | options),
    )
    return SteerablePolicy(policy, trained)


def named_steerable(
    names: list[str], base: Path, conditioner: Conditioner | None = None
) -> SteerablePolicy:
    """One whose rewards have these names; its conditioner is a LoRA if None."""
    made = make_steerable(base)
    policy = Policy(str(base), conditioner or LoRA(rank=2, shared_rank=2))
    policy.build(names)
    for parameter in policy.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    made.trained.rewards, made.policy = names, policy
    made.trained.conditioner = describe(policy.conditioner)
    return made
