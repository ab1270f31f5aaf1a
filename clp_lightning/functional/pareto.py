"""How good a front of points is, whatever the dial does. All quantities are maximised."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expected_utility", "hypervolume", "mean_inner_product", "non_dominated", "spearman"]


def non_dominated(points: Tensor) -> Tensor:
    """Which points no other point dominates: nowhere worse and somewhere better.

    Args:
        points: Shape (G, K). Equal points do not dominate each other.

    Returns:
        Bool, shape (G,).

    Example:
        >>> non_dominated(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]]))
        tensor([ True,  True, False])
    """
    left, right = points.unsqueeze(1), points.unsqueeze(0)
    dominates = (left >= right).all(-1) & (left > right).any(-1)
    return ~dominates.any(0)


def hypervolume(points: Tensor, reference_point: Tensor) -> Tensor:
    """Volume that the points dominate above ``reference_point``, exact for any K.

    By slicing along the last axis, recursively: G ** (K - 2) steps, meant for fronts of a few
    dozen points.

    Args:
        points: Shape (..., G, K); a point that is not above the reference point adds nothing.
        reference_point: Shape (K,).

    Returns:
        Shape (...); 0 without points, NaN where a coordinate is NaN.

    Example:
        >>> hypervolume(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2))
        tensor(3.)
    """
    if points.shape[-2] == 0:
        return points.new_zeros(points.shape[:-2])
    volume = _volume((points - reference_point).clamp_min(0))
    return volume.masked_fill(points.isnan().any((-1, -2)), float("nan"))


def _volume(corners: Tensor) -> Tensor:
    """Volume of the union of boxes between 0 and the non-negative rows of ``corners``."""
    if corners.shape[-1] == 1:
        return corners.amax((-1, -2))
    order = corners[..., -1:].argsort(dim=-2, descending=True)
    corners = corners.gather(-2, order.expand_as(corners))
    last = corners[..., -1]
    heights = last - torch.cat([last[..., 1:], torch.zeros_like(last[..., :1])], -1)
    if corners.shape[-1] == 2:
        return (corners[..., 0].cummax(-1).values * heights).sum(-1)
    slices = [_volume(corners[..., :n, :-1]) for n in range(1, corners.shape[-2] + 1)]
    return (torch.stack(slices, -1) * heights).sum(-1)


def expected_utility(rewards: Tensor, weights: Tensor) -> Tensor:
    """EUM: mean over the weights of the best ``w . R`` that any point of the front offers.

    Args:
        rewards: Mean rewards of the points, shape (G, K).
        weights: The weights asked for, shape (G, K).

    Returns:
        A scalar.

    Example:
        >>> expected_utility(torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.eye(2))
        tensor(2.)
    """
    return (weights @ rewards.T).amax(-1).mean()


def mean_inner_product(rewards: Tensor, weights: Tensor) -> Tensor:
    """MIP: mean of ``w . R`` over the points, each with the weights that it was asked for.

    EUM - MIP is not 0 at the optimum, because neither knows the KL: both are reported for readers
    who know them and gate nothing (docs/method.md, section 6).

    Args:
        rewards: Mean rewards of the points, shape (G, K); NaN with weight 0 does not count.
        weights: Their weights, shape (G, K).

    Returns:
        A scalar.

    Example:
        >>> mean_inner_product(torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.eye(2))
        tensor(1.)
    """
    return torch.where(weights == 0, 0, weights * rewards).sum(-1).mean()


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation with average ranks for ties.

    Args:
        x: Shape (N,).
        y: Shape (N,).

    Returns:
        A scalar in [-1, 1]; NaN where either is constant or holds NaN.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
        tensor(1.0000)
    """
    if x.isnan().any() or y.isnan().any():
        return x.new_full((), float("nan"))
    a, b = (_ranks(x) - _ranks(x).mean()), (_ranks(y) - _ranks(y).mean())
    return (a @ b) / (a.norm() * b.norm())


def _ranks(x: Tensor) -> Tensor:
    """Average rank of every entry, shape (N,)."""
    smaller = (x.unsqueeze(0) < x.unsqueeze(1)).sum(-1)
    not_larger = (x.unsqueeze(0) <= x.unsqueeze(1)).sum(-1)
    return (smaller + not_larger + 1).to(x) / 2
