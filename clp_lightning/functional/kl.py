"""The log-ratio of policy to reference, and what is left of it to go."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k3", "kl_to_go", "log_ratio"]


def log_ratio(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Log-ratio of policy to reference, token by token, in nats.

    Summed over a response sampled from the policy, its mean is KL(policy || reference). This
    plain form is the KL term of the return; the non-negative ``k3`` is for display only, because
    its score-function gradient is not that of the KL (DESIGN.md section 3).

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


def kl_to_go(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """Sum of the log-ratios from each token to the end of its response.

    A token's action cannot change the log-ratio of the tokens before it, so leaving those out
    of its return lowers the noise and keeps the expectation (DESIGN.md section 3).

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
    reward its gradient points elsewhere (DESIGN.md section 3).

    Args:
        log_ratio: Log-ratios of tokens, any shape.

    Returns:
        The same shape.

    Example:
        >>> k3(torch.tensor([0.0]))
        tensor([0.])
    """
    return torch.expm1(-log_ratio) + log_ratio
