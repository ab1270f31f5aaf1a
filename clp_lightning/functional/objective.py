"""From K rewards and the KL to one number, V."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Preference

__all__ = ["coefficients", "objective", "scalarize"]


def coefficients(preference: Preference) -> Tensor:
    """What V multiplies rewards and KL with: ``((1 - alpha) w, -alpha)``, shape (B, K + 1)."""
    alpha = preference.alpha.unsqueeze(-1)
    return torch.cat([(1 - alpha) * preference.weights, -alpha], -1)


def scalarize(signals: Tensor, *, preference: Preference) -> Tensor:
    """``(1 - alpha) w . R - alpha KL`` for every response, or for every token.

    A signal whose coefficient is 0 does not count, even where it is NaN (not scored).

    Args:
        signals: K rewards and then the KL (to go), shape (B, K + 1) or (B, T, K + 1).
        preference: B rows.

    Returns:
        Shape (B,) or (B, T); NaN where a signal that counts is NaN.

    Example:
        >>> preference = Preference.single([0.5, 0.5], alpha=0.5)
        >>> scalarize(torch.tensor([[1.0, 3.0, 0.5]]), preference=preference)
        tensor([0.7500])
    """
    factors = coefficients(preference).to(signals.dtype)
    factors = factors.reshape(len(factors), *[1] * (signals.ndim - 2), factors.shape[-1])
    return torch.where(factors == 0, 0, factors * signals).sum(-1)


def objective(rewards: Tensor, kl: Tensor, *, preference: Preference) -> Tensor:
    """The objective V(pi; w, alpha) from means over responses (docs/method.md, section 1).

    Args:
        rewards: Mean rewards, shape (B, K).
        kl: KL to the reference in nats per response, shape (B,).
        preference: B rows.

    Returns:
        Shape (B,).

    Example:
        >>> preference = Preference.single([1.0], alpha=0.25)
        >>> objective(torch.tensor([[2.0]]), torch.tensor([2.0]), preference=preference)
        tensor([1.])
    """
    return scalarize(torch.cat([rewards, kl.unsqueeze(-1)], -1), preference=preference)
