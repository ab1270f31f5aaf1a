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
    """``seed`` itself, or the one of ``seed_everything`` (0 where none was set).

    Raises:
        ValueError: it is negative, which no key may be.
    """
    if seed is None:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}.")
    return int(seed)


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
        Float64 multiples of 2**-32, shape (B, T). Row b depends on its own key only, and a
        shorter ``length`` gives a prefix of a longer one.
    """
    ids = prompt_ids.cpu().numpy().astype(np.uint64)[:, None]
    draw = sample.cpu().numpy().astype(np.uint64)[:, None]
    block = np.arange(-(-length // 4), dtype=np.uint64)
    counter = (block, draw, ids & _LOW, np.uint64(epoch))
    words = philox(counter, key=(np.uint64(seed) & _LOW, ids >> _32 ^ np.uint64(seed) >> _32))
    rows = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(len(ids), 4 * len(block))
    return torch.from_numpy(rows[:, :length] / 2.0**32)


_32, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
Words = np.ndarray | np.uint64


def philox(counter: tuple[Words, ...], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Philox4x32-10: 128 random bits for every counter and key, in arrays at once.

    A generator without state (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
    because creating a generator for every response costs more than a small model's forward.

    Args:
        counter: Four words below 2**32, uint64 arrays that broadcast.
        key: Two such words.

    Returns:
        Four words below 2**32.
    """
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = second >> _32 ^ b ^ left, second & _LOW
        c, d = first >> _32 ^ d ^ right, first & _LOW
        left, right = left + np.uint64(0x9E3779B9) & _LOW, right + np.uint64(0xBB67AE85) & _LOW
    return a, b, c, d
