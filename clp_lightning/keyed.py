"""Randomness keyed by what it is for, never drawn from a global stream.

A resumed run, or one on more processes, draws what the first run drew, because a draw depends
on its key only: (seed, epoch, prompt id) for a prompt, (seed, epoch, prompt id, sample) for a
response, (seed, step) for a step.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

__all__ = ["generator", "resolve_seed", "uniforms"]


def resolve_seed(seed: int | None) -> int:
    """``seed`` itself, or the one of ``seed_everything`` (0 where none was set)."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def generator(*key: int) -> torch.Generator:
    """A torch generator on the CPU for ``key``, non-negative integers.

    Example:
        >>> a, b = generator(0, 1, 2), generator(0, 1, 2)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=generator(0, 1, 2, 0)))
        False
    """
    # With its length, because numpy fills short keys up with zeros.
    (state,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def uniforms(seed: int, epoch: int, prompt_ids: Tensor, sample: Tensor, length: int) -> Tensor:
    """Uniform numbers in [0, 1) for every token of every response.

    Args:
        seed: The run's seed.
        epoch: The sampler's count of passes over the data.
        prompt_ids: Row numbers, shape (B,).
        sample: Number of the response within its group, shape (B,).
        length: Number of tokens, T.

    Returns:
        Float64, shape (B, T). Row b depends on its own key only, and a shorter
        ``length`` gives a prefix of a longer one.
    """
    keys = [(seed, epoch, p, s) for p, s in zip(prompt_ids.tolist(), sample.tolist(), strict=True)]
    bits = [np.random.PCG64(np.random.SeedSequence(key)) for key in keys]
    rows = [np.random.Generator(source).random(length) for source in bits]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)
