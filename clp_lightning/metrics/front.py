"""The front as a metric: filled batch by batch, merged over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..types import Preference
from .report import FrontReport
from .samples import FrontSamples

__all__ = ["Front"]


class Front(Metric):
    """Rewards, KL and length at every preference of a grid, and of the reference.

    Responses are told apart by (prompt, point, sample), so the duplicates with which a
    distributed sampler fills up its last batch count once, and processes may hold different
    numbers of them.

    Args:
        names: The K rewards, in the order of the reward bank.
        grid: Preferences, G rows; ``Grid.preferences`` makes them.
        reference_point: Of the hypervolume, in normalised rewards; -1 each if None.
    """

    full_state_update = False
    is_differentiable = False
    keys: list[Tensor] | Tensor
    numbers: list[Tensor] | Tensor

    def __init__(
        self,
        names: Sequence[str],
        grid: Preference,
        reference_point: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if grid.num_rewards != len(names):
            raise ValueError(f"The grid has {grid.num_rewards} weights for {len(names)} rewards.")
        if reference_point is not None and len(reference_point) != len(names):
            raise ValueError(
                f"reference_point needs one number for each of {list(names)}, "
                f"got {list(reference_point)}."
            )
        if not all(math.isfinite(number) for number in reference_point or ()):
            raise ValueError(f"reference_point must be finite; got {list(reference_point or ())}.")
        self.names, self.grid = list(names), grid
        self.reference_point = reference_point
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(
        self,
        point: Tensor,
        prompt_ids: Tensor,
        sample: Tensor,
        rewards: Tensor,
        normalized: Tensor,
        log_ratio: Tensor,
        length: Tensor,
        truncated: Tensor,
    ) -> None:
        """Adds responses.

        Args:
            point: Row of the grid, or -1 for the reference, shape (B,).
            prompt_ids: Shape (B,).
            sample: Number of the response within its group, shape (B,).
            rewards: As the rewards gave them, NaN = not scored, shape (B, K).
            normalized: With frozen mean and deviation, shape (B, K).
            log_ratio: log pi(y) - log pi_ref(y), summed over the response, nats, shape (B,).
            length: Response tokens, shape (B,).
            truncated: True where the response was cut at the limit, shape (B,).
        """
        device = self.device
        columns = [log_ratio, length, truncated]
        keys = [prompt_ids, point, sample]
        assert isinstance(self.keys, list) and isinstance(self.numbers, list)
        self.keys.append(torch.stack([key.to(device).long() for key in keys], -1))
        parts = [rewards, normalized, *[column.unsqueeze(-1) for column in columns]]
        self.numbers.append(torch.cat([part.to(device).float() for part in parts], -1))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Merges over processes; one that saw no response brings an empty table."""
        if isinstance(self.keys, list) and isinstance(self.numbers, list) and not self.keys:
            self.keys.append(torch.empty(0, 3, dtype=torch.long, device=self.device))
            self.numbers.append(torch.empty(0, 2 * len(self.names) + 3, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> FrontReport:
        """The statistics of everything seen so far.

        Raises:
            ValueError: if there is nothing of the reference, or of a point of the grid.
        """
        keys, numbers = dim_zero_cat(self.keys).cpu(), dim_zero_cat(self.numbers).cpu()
        for point in range(-1, len(self.grid)):
            if not (keys[:, 1] == point).any():
                name = "the reference" if point < 0 else f"point {point} of the grid"
                raise ValueError(f"The front has no response of {name}.")
        k = len(self.names)
        rewards, normalized, rest = numbers.split([k, k, 3], -1)
        samples = FrontSamples(
            prompt_id=keys[:, 0],
            point=keys[:, 1],
            sample=keys[:, 2],
            rewards=rewards,
            normalized=normalized,
            log_ratio=rest[:, 0],
            length=rest[:, 1].long(),
            truncated=rest[:, 2].bool(),
        )
        return FrontReport(samples, self.names, self.grid, self.reference_point)
