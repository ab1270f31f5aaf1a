"""Token log-probabilities and masked sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["log_distribution", "masked_sum", "token_logprobs"]

# Logits: so many stay in a processor's cache; elsewhere starting an operation is what costs.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**19, 2**26


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
    if logits.ndim > 1 and logits.numel() > _AT_ONCE:
        chosen: Tensor = _Chosen.apply(logits, tokens)
        return chosen
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


class _Chosen(torch.autograd.Function):
    """``log_softmax`` and ``gather``, some rows at a time: logits are many, and memory is slow.

    The gradient with respect to logit v is ``g (1[v = token] - softmax_v)``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        rows = _rows_at_once(logits)
        pieces = zip(logits.split(rows), tokens.unsqueeze(-1).split(rows), strict=True)
        return torch.cat([z.log_softmax(-1).gather(-1, ids) for z, ids in pieces]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, tokens = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient shall have one, too
            every = -grad.unsqueeze(-1) * logits.softmax(-1)
            return every.scatter_add(-1, tokens.unsqueeze(-1), grad.unsqueeze(-1)), None
        found, grad = torch.empty_like(logits), grad.unsqueeze(-1)
        whole = (found, logits, tokens.unsqueeze(-1), grad)
        pieces = zip(*(each.split(_rows_at_once(logits)) for each in whole), strict=True)
        for piece, z, ids, g in pieces:
            torch.softmax(z, -1, out=piece)
            piece.mul_(-g).scatter_add_(-1, ids, g)
        return found, None


def _rows_at_once(logits: Tensor) -> int:
    at_once = _AT_ONCE if logits.device.type == "cpu" else _AT_ONCE_ELSEWHERE
    return max(1, at_once * len(logits) // max(logits.numel(), 1))


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
