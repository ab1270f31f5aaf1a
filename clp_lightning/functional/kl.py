"""The KL of policy to reference: of what was sampled, to go, or over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k3", "kl_to_go", "log_ratio", "vocabulary_kl"]


def log_ratio(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Log-ratio of policy to reference, token by token, in nats.

    Summed over a response sampled from the policy, its mean is KL(policy || reference). This
    plain form is the KL term of the return; the non-negative ``k3`` is for display only, because
    its score-function gradient is not that of the KL (docs/method.md, section 3).

    Args:
        logp: Log-probability under the policy, shape (B, T).
        ref_logp: The same tokens under the reference, shape (B, T).

    Returns:
        Log-ratios, shape (B, T).

    Example:
        >>> log_ratio(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]))
        tensor([[1.]])
    """
    return logp - ref_logp


def vocabulary_kl(logd: Tensor, ref_logd: Tensor) -> Tensor:
    """KL(policy || reference) of the next token, given what stands before it, in nats.

    Summed over a sampled response, its mean is that of the log-ratios. Its gradient is the
    token's own part of the KL's gradient; the rest is score function times the KL of *later*
    tokens (docs/method.md, section 3).

    Args:
        logd: Log-probability of every token under the policy, shape (B, T, V).
        ref_logd: The same under the reference, shape (B, T, V).

    Returns:
        Shape (B, T), not negative.

    Example:
        >>> policy, reference = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]).log()
        >>> vocabulary_kl(policy[None], reference[None])
        tensor([[0.5108]])
    """
    # A token that the policy cannot take counts 0, whatever its log-ratio.
    ratio = (logd - ref_logd).masked_fill(logd == -torch.inf, 0)
    return (logd.exp() * ratio).sum(-1)


def kl_to_go(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """Sum of the log-ratios from each token to the end of its response.

    A token cannot change the log-ratios before it, so a return without them has the same
    expectation (docs/method.md, section 3). The first token's is that of the whole response.

    Args:
        log_ratio: Log-ratios of tokens, shape (B, T).
        response_mask: True where a token counts, shape (B, T).

    Returns:
        Shape (B, T); 0 after the end of a response.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> kl_to_go(torch.tensor([[1.0, 2.0, 9.0]]), mask)
        tensor([[3., 2., 0.]])
    """
    return log_ratio.masked_fill(~response_mask, 0).flip(-1).cumsum(-1).flip(-1)


def k3(log_ratio: Tensor) -> Tensor:
    """A non-negative, low-noise estimate of the KL per token, for display only.

    ``exp(-l) - 1 + l`` (J. Schulman, "Approximating KL divergence", 2020). Never in a return: as a
    reward its gradient points elsewhere (docs/method.md, section 3).

    Args:
        log_ratio: Log-ratios of tokens, any shape.

    Returns:
        The same shape.

    Example:
        >>> k3(torch.tensor([0.0]))
        tensor([0.])
    """
    return torch.expm1(-log_ratio) + log_ratio
