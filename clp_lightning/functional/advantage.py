"""Baselines: what a response is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_siblings", "leave_one_out"]


def leave_one_out(values: Tensor, *, groups: Tensor) -> Tensor:
    """Each value minus the mean of its siblings, column by column.

    NaN means "not scored": it has no signal (0) and is nobody's sibling. A value without a scored
    sibling has no signal either. The result is not divided by the group's deviation, which would
    change the objective (docs/method.md, section 3).

    Args:
        values: One row per response, shape (B, ...); NaN = not scored.
        groups: Which responses share prompt and preference, integers in [0, B), shape (B,).

    Returns:
        The shape of ``values``, without NaN.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 3.0]), groups=torch.tensor([0, 0, 0]))
        tensor([-1.5000,  0.0000,  1.5000])
    """
    scored = ~values.isnan()
    filled = values.masked_fill(~scored, 0)
    # B groups at most: a size that does not depend on the values needs no device sync.
    total = torch.zeros_like(filled).index_add_(0, groups, filled)[groups]
    siblings = torch.zeros_like(filled).index_add_(0, groups, scored.to(filled))[groups] - 1
    baseline = (total - filled) / siblings.clamp_min(1)
    return (filled - baseline).masked_fill(~scored | (siblings < 1), 0)


def has_siblings(groups: Tensor, *, among: Tensor) -> Tensor:
    """Where another response of the same group is among the chosen ones.

    Args:
        groups: Which responses share prompt and preference, integers in [0, B), shape (B,).
        among: True for the chosen ones, shape (B,).

    Returns:
        Bools, shape (B,).

    Example:
        >>> groups = torch.tensor([0, 0, 1, 1])
        >>> has_siblings(groups, among=torch.tensor([True, True, True, False]))
        tensor([ True,  True, False,  True])
    """
    chosen = among.to(groups)
    return torch.zeros_like(groups).index_add_(0, groups, chosen)[groups] > chosen
