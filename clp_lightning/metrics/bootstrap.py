"""Bootstrap with prompts as clusters: the whole grid of a prompt is drawn together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..keyed import generator

__all__ = ["Estimate", "cluster_means", "redraw_within_prompts", "resample_counts"]

_RESAMPLES = 1000
_SEED = 0  # of the resampling, not of the run: the same table gives the same intervals


@dataclass
class Estimate:
    """A number with its 95 % interval; None is undefined.

    Attributes:
        mean: The number on the data as they are.
        low: 2.5 % quantile over the resamples.
        high: 97.5 % quantile.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Tensor, num_prompts: int) -> Estimate:
        """From ``values`` whose first row is the data and whose others are resamples, (R + 1,).

        One prompt has no interval. A resample in which the number is undefined is left out.
        """
        if values[0].isnan():
            return cls()
        if num_prompts < 2:
            return cls(mean=values[0].item())
        low, high = values[1:].nanquantile(values.new_tensor([0.025, 0.975])).tolist()
        return cls(values[0].item(), low, high)

    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def resample_counts(number: int, *key: int) -> Tensor:
    """How often each resample draws each of ``number`` prompts (or seeds).

    Args:
        number: N.
        *key: Draws of other keys are independent; equal ones draw the same prompts.

    Returns:
        Float64, shape (R + 1, N) with R = 1,000; row 0 is the data, each once.
    """
    drawn = torch.randint(number, (_RESAMPLES, number), generator=generator(_SEED, *key))
    counts = torch.zeros(_RESAMPLES, number, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return torch.cat([torch.ones(1, number, dtype=torch.float64), counts])


def cluster_means(cells: Tensor, counts: Tensor) -> Tensor:
    """Means over the prompts of every resample, those without a value (NaN) left out.

    Args:
        cells: Means per prompt, shape (N, ...).
        counts: From ``resample_counts``, shape (R + 1, N).

    Returns:
        Shape (R + 1, ...); NaN where no prompt has a value.
    """
    flat = cells.flatten(1)
    seen = ~flat.isnan()
    means = (counts @ flat.masked_fill(~seen, 0)) / (counts @ seen.double())
    return means.reshape(-1, *cells.shape[1:])


def redraw_within_prompts(prompt_id: Tensor, draws: int) -> Tensor:
    """Rows drawn with replacement among the rows of the same prompt, ``draws`` times.

    Args:
        prompt_id: Prompt of every row, sorted, shape (B,).
        draws: Number of redrawn tables, G.

    Returns:
        Row indices, shape (G, B).
    """
    _, prompt, size = prompt_id.unique(return_inverse=True, return_counts=True)
    start = size.cumsum(0) - size
    uniform = torch.rand(draws, len(prompt_id), dtype=torch.float64, generator=generator(_SEED, 1))
    return start[prompt] + (uniform * size[prompt]).long()
