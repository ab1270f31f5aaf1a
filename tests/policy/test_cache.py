"""Decoding with a cache that grows in place, against Transformers' own, which concatenates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clp_lightning import Policy, Preference
from clp_lightning.policy import cache as cache_module
from clp_lightning.policy.cache import grow_in_place
from clp_lightning.policy.prefix import Prefix, extend, read_prompt
from tests.helpers import PROMPTS, build_policy
from tests.tiny import KINDS

PREFERENCE = Preference.single([0.3, 0.7], 0.1)


def read(policy: Policy) -> Prefix:
    """Four responses to three prompts, not yet begun."""
    ids, mask = policy.encode(PROMPTS)
    return read_prompt(policy.model, ids, mask).select(torch.tensor([0, 1, 1, 2]))


@torch.no_grad()
def continued(policy: Policy, tokens: Tensor, *, in_place: bool) -> list[Tensor]:
    """Logits behind every token; on the way two rows end."""
    logits = []
    with policy.conditioner.merged(PREFERENCE):
        prefix = read(policy)
        if in_place:
            grow_in_place(prefix.cache)
        for step, token in enumerate(tokens.T):
            if step == 4:
                prefix = prefix.select(torch.tensor([1, 3]))
            running = token if step < 4 else token[[1, 3]]
            logits.append(extend(policy.model, prefix, running.unsqueeze(-1)))
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_plain_cache(
    tiny_folder: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_ROOM", 2)  # so that it is used up more than once
    policy = build_policy(tiny_folder(kind), perturb=0.1)
    tokens = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    got, expected = (continued(policy, tokens, in_place=which) for which in (True, False))
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_a_token_does_not_move_the_others(tiny_folder: Callable[..., Path]) -> None:
    policy = build_policy(tiny_folder("llama"))
    with policy.conditioner.merged(PREFERENCE):
        prefix = read(policy)
        grow_in_place(prefix.cache)
        places = []
        for _ in range(4):
            extend(policy.model, prefix, torch.full((4, 1), 7))
            layer = prefix.cache.layers[0]
            places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(set(places)) == 1
