"""The responses behind a front: one row each, deduplicated, and their means per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["REFERENCE", "FrontSamples"]

REFERENCE = -1
"""The ``point`` of responses that were sampled from the reference."""


@dataclass
class FrontSamples:
    """Responses of a front; row b is one response.

    Attributes:
        prompt_id: int64, shape (B,).
        point: Row of the grid, or -1 for the reference, shape (B,).
        sample: Number of the response within prompt and point, shape (B,).
        rewards: As the rewards gave them, NaN = not scored, shape (B, K).
        normalized: With frozen mean and deviation, shape (B, K).
        log_ratio: log pi(y) - log pi_ref(y) of the response in nats, shape (B,).
        length: Response tokens, shape (B,).
        truncated: True where the response was cut at the limit, shape (B,).
    """

    prompt_id: Tensor
    point: Tensor
    sample: Tensor
    rewards: Tensor
    normalized: Tensor
    log_ratio: Tensor
    length: Tensor
    truncated: Tensor

    def __len__(self) -> int:
        return len(self.prompt_id)

    def deduplicated(self) -> FrontSamples:
        """Each (prompt, point, sample) once, in this order; of duplicates the first row."""
        key = torch.stack([self.prompt_id, self.point, self.sample], -1)
        unique, inverse = key.unique(dim=0, return_inverse=True)
        rows = torch.arange(len(key))
        first = rows.new_empty(len(unique)).scatter_reduce(
            0, inverse, rows, "amin", include_self=False
        )
        return self.select(first)

    def cells(self, num_points: int) -> Tensor:
        """Mean of every number over the samples of a prompt at a point; not-scored ones left out.

        Args:
            num_points: G, the rows of the grid.

        Returns:
            Float64, shape (N, G + 1, 2K + 3): N prompts; the reference, then the points; rewards,
            normalised rewards, log-ratio, length, truncated. NaN where nothing was scored.
        """
        ids, prompt = self.prompt_id.unique(return_inverse=True)
        columns = [self.log_ratio, self.length, self.truncated]
        numbers = torch.cat(
            [self.rewards.double(), self.normalized.double()]
            + [column.double().unsqueeze(-1) for column in columns],
            -1,
        )
        cell = prompt * (num_points + 1) + self.point - REFERENCE
        scored = ~numbers.isnan()
        empty = numbers.new_zeros(len(ids) * (num_points + 1), numbers.shape[-1])
        total = empty.index_add(0, cell, numbers.masked_fill(~scored, 0))
        count = empty.index_add(0, cell, scored.double())
        return (total / count).reshape(len(ids), num_points + 1, -1)

    @classmethod
    def cat(cls, parts: Sequence[FrontSamples]) -> FrontSamples:
        """Rows of several tables, one after the other."""
        return cls(*[torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)])

    def select(self, rows: Tensor) -> FrontSamples:
        """The rows at ``rows``, an index or a mask."""
        return FrontSamples(*[getattr(self, f.name)[rows] for f in fields(self)])

    def at(self, point: int) -> FrontSamples:
        """The rows of one point."""
        return self.select(self.point == point)

    def columns(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The table of front_samples.parquet, in the order of its columns."""
        named = {
            "prompt_id": self.prompt_id,
            "point": self.point.int(),
            "sample": self.sample.int(),
        }
        named |= {f"reward/{name}": self.rewards[:, k] for k, name in enumerate(names)}
        named |= {f"normalized/{name}": self.normalized[:, k] for k, name in enumerate(names)}
        rest = {"log_ratio": self.log_ratio, "length": self.length, "truncated": self.truncated}
        return named | rest


def within_prompt_covariance(samples: FrontSamples) -> Tensor:
    """C: covariance of the normalised rewards between samples of a prompt, mean over prompts.

    Unbiased within a prompt, and over the samples that both rewards scored. Rewards that never
    score the same prompt covary by 0.

    Args:
        samples: Responses of the reference, two or more a prompt.

    Returns:
        Float64, shape (K, K); the diagonal is NaN for a reward that no prompt has two scores of.
    """
    ids, prompt = samples.prompt_id.unique(return_inverse=True)
    values = samples.normalized.double()
    seen = (~values.isnan()).double()
    values = values.nan_to_num()

    def per_prompt(left: Tensor, right: Tensor) -> Tensor:
        """Sum over the samples of each prompt of left_i right_j, shape (N, K, K)."""
        products = left.unsqueeze(-1) * right.unsqueeze(-2)
        return products.new_zeros(len(ids), *products.shape[1:]).index_add(0, prompt, products)

    count = per_prompt(seen, seen)
    total = per_prompt(values, seen)  # of reward i over the samples that j scored too
    centred = per_prompt(values, values) - total * total.transpose(1, 2) / count
    covariance = (centred / (count - 1)).masked_fill(count < 2, float("nan")).nanmean(0)
    off_diagonal = ~torch.eye(len(covariance), dtype=torch.bool)
    return covariance.masked_fill(off_diagonal & covariance.isnan(), 0)
