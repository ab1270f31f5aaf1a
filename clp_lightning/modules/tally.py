"""Sums over the micro-batches and ranks of one optimizer step, reduced in one collective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Tally"]


class Tally:
    """Named sums and counts, added up over micro-batches, all-reduced once per step."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Adds the finite ``values`` (where ``where`` is True) to the mean called ``name``."""
        values = values.detach().double()
        counted = values.isfinite() if where is None else values.isfinite() & where
        # Every name is kept, seen or not, so that all ranks reduce the same vector.
        self._sums[name] = self._sums.get(name, 0.0) + float(values[counted].sum())
        self._counts[name] = self._counts.get(name, 0.0) + float(counted.sum())

    def count(self, name: str, value: float) -> None:
        """Adds ``value`` to the total called ``name``."""
        self._sums[name] = self._sums.get(name, 0.0) + value

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means and totals over all micro-batches and ranks; empties the tally.

        Args:
            reduce: Sums a tensor over all ranks.

        Returns:
            A mean that nothing was added to is left out.
        """
        totals = [name for name in sorted(self._sums) if name not in self._counts]
        means = sorted(self._counts)
        vector = [self._sums[name] for name in totals + means] + [
            self._counts[name] for name in means
        ]
        summed = reduce(torch.tensor(vector, dtype=torch.float64)).tolist()
        result = dict(zip(totals, summed, strict=False))
        sums, counts = summed[len(totals) : len(totals) + len(means)], summed[-len(means) :]
        if means:
            result |= {n: s / c for n, s, c in zip(means, sums, counts, strict=True) if c}
        self._sums, self._counts = {}, {}
        return result
