"""What rewards are called with in tests, and rewards that several tests call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clp_lightning import Preference, Rollout
from clp_lightning.rewards import Reward
from clp_lightning.types import Prompt


def rollout(
    completions: list[str], prompts: list[Prompt] | None = None, **columns: list[Any]
) -> Rollout:
    size = len(completions)
    ids = torch.arange(4).repeat(size, 1)
    return Rollout(
        prompts=[f"prompt {i}" for i in range(size)] if prompts is None else prompts,
        prompt_ids=torch.arange(size),
        groups=torch.arange(size),
        sample=torch.zeros(size, dtype=torch.long),
        preference=Preference(torch.ones(size, 1), torch.zeros(size)),
        input_ids=ids,
        prompt_mask=torch.ones(size, 4, dtype=torch.bool),
        response_ids=ids,
        # Row b holds b + 1 tokens, the last of them the stop token.
        response_mask=torch.arange(4) <= torch.arange(size)[:, None],
        completions=completions,
        truncated=torch.zeros(size, dtype=torch.bool),
        columns=columns,
    )


def returning(value: Any) -> Callable[..., Any]:
    return lambda **_: value


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


class Own(Reward):
    required_columns = ("document",)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [float(len(document)) for document in columns["document"]]
