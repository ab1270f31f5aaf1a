"""Rows of like length, run together: less of what a model computes is padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Bundle", "bundles", "cut", "score_bundles", "whole"]

# What a cut must save, or one more pass costs more: positions, and multiplications with weights.
# On GPUs an estimate.
_WORTH = {"cpu": (128, 1e9)}
_WORTH_ELSEWHERE = (1024, 4e12)


@dataclass
class Bundle:
    """Rows of a batch that are run together.

    Attributes:
        rows: Their numbers, ascending, shape (n,).
        prompt: Tokens of the longest prompt among them.
        response: Tokens of the longest response among them.
    """

    rows: Tensor
    prompt: int
    response: int


def whole(groups: Tensor, prompt_mask: Tensor, response_mask: Tensor) -> Bundle:
    """All rows as they are; their numbers stand where ``groups`` does."""
    rows = torch.arange(len(groups), device=groups.device)
    return Bundle(rows, prompt_mask.shape[1], response_mask.shape[1])


def bundles(
    num_weights: int,
    prompt_mask: Tensor,
    response_mask: Tensor,
    *,
    prompts_apart: bool = False,
    together: Tensor | None = None,
) -> list[Bundle]:
    """All rows, in as many bundles as are worth a pass of the model each.

    Args:
        num_weights: Of the model, which stands where the masks do.
        prompt_mask: True where a token stands, shape (B, L).
        response_mask: The same of the responses, shape (B, T).
        prompts_apart: Prompts are run by themselves, all at once.
        together: Rows with the same number stay in one bundle, shape (B,), from 0 on.
    """
    prompts = prompt_mask.sum(-1)
    if prompts_apart:
        prompts = torch.full_like(prompts, prompt_mask.shape[1])
    # At least one, where something else than a token must stand.
    lengths = torch.stack([prompts, response_mask.sum(-1)], 1).clamp(min=1)
    if together is not None:
        numbers = together.unsqueeze(1).expand_as(lengths)
        lengths = torch.zeros_like(lengths).scatter_reduce(0, numbers, lengths, "amax")[together]
    device = prompt_mask.device
    positions, multiplications = _WORTH.get(device.type, _WORTH_ELSEWHERE)
    lengths = lengths.cpu()
    parts = cut(lengths, max(positions, multiplications / num_weights))
    return [Bundle(rows.to(device), *lengths[rows].amax(0).tolist()) for rows in parts]


def cut(lengths: Tensor, worth: float) -> list[Tensor]:
    """Numbers of rows, bundle by bundle; every cut saves more than ``worth`` padded positions.

    Args:
        lengths: Of the parts of every row that are padded each to its longest, shape (B, parts).
        worth: 0 or more.

    Example:
        >>> [rows.tolist() for rows in cut(torch.tensor([[9], [1], [8], [2]]), worth=10)]
        [[1, 3], [0, 2]]
    """
    count = len(lengths)
    before = torch.arange(1, count)
    best, halves = worth, []
    for part in lengths.unbind(1):
        order = part.argsort(stable=True)
        up = lengths[order].cummax(0).values.sum(1)
        down = lengths[order].flip(0).cummax(0).values.sum(1).flip(0)
        saved = count * up[-1:] - before * up[:-1] - before.flip(0) * down[1:]
        if count > 1 and saved.max() > best:
            best, at = float(saved.max()), int(saved.argmax()) + 1
            halves = [order[:at].sort().values, order[at:].sort().values]
    if not halves:
        return [torch.arange(count)]
    return [rows[inner] for rows in halves for inner in cut(lengths[rows], worth)]


def score_bundles(bundles: list[Bundle], length: int, score: Callable[[Bundle], Tensor]) -> Tensor:
    """What ``score`` says of every bundle, in the order of the rows, shape (B, T, ...).

    Args:
        bundles: Of a batch.
        length: T; what is behind the end of a bundle is 0.
        score: Returns shape (n, bundle.response, ...).
    """
    scores = [_longer(score(bundle), length) for bundle in bundles]
    if len(bundles) == 1:
        return scores[0]
    return torch.cat(scores)[torch.cat([bundle.rows for bundle in bundles]).argsort()]


def _longer(scores: Tensor, length: int) -> Tensor:
    """With zeros behind the end; the same where there is no need, because padding copies."""
    missing = length - scores.shape[1]
    return F.pad(scores, [0, 0] * (scores.ndim - 2) + [0, missing]) if missing else scores
