"""Token log-probabilities and masked sums."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_distribution", "masked_sum", "token_logprobs"]


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature), in nats.

    Args:
        logits: Shape (B, T, V).
        tokens: Token ids, shape (B, T).
        temperature: Positive; 1 leaves the logits as they are.

    Returns:
        Shape (B, T), float32 or wider.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0]]])
        >>> token_logprobs(logits, torch.tensor([[1]])).exp()
        tensor([[0.5000]])
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def log_distribution(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of every token of the vocabulary, in nats.

    Args:
        logits: Shape (B, T, V).
        temperature: Positive; 1 leaves the logits as they are.

    Returns:
        Shape (B, T, V), float32 or wider.

    Example:
        >>> log_distribution(torch.tensor([[[0.0, 0.0]]])).exp()
        tensor([[[0.5000, 0.5000]]])
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last axis where ``mask`` is True; what stands elsewhere may be anything.

    Example:
        >>> masked_sum(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
        tensor([1.])
    """
    return values.masked_fill(~mask, 0).sum(-1)
