"""Losses of models that rank responses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["bradley_terry_loss"]


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Minus the log-probability that the chosen response wins, in nats, pair by pair.

    Bradley and Terry, *Rank Analysis of Incomplete Block Designs* (1952): the chosen one wins with
    probability sigmoid(chosen - rejected).

    Args:
        chosen: Scores of the chosen responses, shape (B,).
        rejected: Scores of the rejected ones, shape (B,).
        margin: By how much the chosen one should at least win, shape (B,); 0 if None.

    Returns:
        Losses, shape (B,).

    Example:
        >>> import torch
        >>> bradley_terry_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]))
        tensor([0.6931, 0.0486])
    """
    lead = chosen - rejected
    return -F.logsigmoid(lead if margin is None else lead - margin)
