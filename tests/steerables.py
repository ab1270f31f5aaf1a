"""Trained dials without training: tiny policies whose copies are away from zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clp_lightning import Pretrained, SteerablePolicy
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
