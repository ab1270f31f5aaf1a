"""The grid of preferences at which a front is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..functional import check_alpha, check_weights, simplex_grid
from ..types import Preference

__all__ = ["Grid"]

_MANY = 100_000  # weightings; each is sampled for every prompt


@dataclass
class Grid:
    """Which preferences to measure: every weighting at every alpha.

    Args:
        divisions: The weights are all multiples of 1 / divisions (K = 3, 4: 15 weightings).
        alphas: KL strengths, each in [0, 1].
        weights: Weightings by reward name, instead of ``divisions``.
    """

    divisions: int = 4
    alphas: list[float] = field(default_factory=lambda: [0.1])
    weights: list[dict[str, float]] | None = None

    def __post_init__(self) -> None:
        if self.divisions < 1:
            raise ValueError(f"Grid.divisions must be at least 1, got {self.divisions}.")
        alphas: Any = self.alphas
        if not isinstance(alphas, (list, tuple)):
            raise ValueError(
                f"Grid.alphas is a list of KL strengths, such as [0.1]; got {alphas!r}."
            )
        if not self.alphas:
            raise ValueError("Grid.alphas is empty; give at least one KL strength, such as [0.1].")
        if self.weights is not None and not self.weights:
            raise ValueError("Grid.weights is empty; leave it out to use Grid.divisions.")
        try:
            for alpha in self.alphas:
                check_alpha(alpha)
        except ValueError as error:
            raise ValueError(f"Grid.alphas: {error}") from None

    def preferences(self, names: Sequence[str]) -> Preference:
        """The grid as rows: alpha outside, weights inside.

        Args:
            names: The rewards, in the order of the reward bank.

        Raises:
            ValueError: if explicit weights do not fit the names, or there are too many weightings.

        Example:
            >>> Grid(divisions=1, alphas=[0.1, 0.5]).preferences(["a", "b"]).alpha
            tensor([0.1000, 0.1000, 0.5000, 0.5000])
        """
        if self.weights is None:
            count = math.comb(self.divisions + len(names) - 1, len(names) - 1)
            if count > _MANY:
                raise ValueError(
                    f"Grid.divisions={self.divisions} means {count:,} weightings of {len(names)} "
                    f"rewards; at most {_MANY:,} are possible, and some tens usual: lower it."
                )
            weights = simplex_grid(len(names), self.divisions)
        else:
            weights = torch.stack([check_weights(row, names) for row in self.weights])
        alpha = torch.tensor(self.alphas, dtype=torch.float32)
        return Preference(weights.repeat(len(alpha), 1), alpha.repeat_interleave(len(weights)))
