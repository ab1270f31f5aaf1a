"""The policy-gradient loss."""

from __future__ import annotations

from torch import Tensor

__all__ = ["policy_gradient_loss"]


def policy_gradient_loss(
    logp: Tensor, advantage: Tensor, response_mask: Tensor, *, num_responses: float
) -> Tensor:
    """REINFORCE: minus the sum over tokens of advantage times log-probability, per response.

    The objective sums over tokens and averages over responses. Dividing by the number of tokens
    that happened to be sampled bends the gradient (docs/method.md, section 3), so: a constant.

    Args:
        logp: Log-probabilities under the policy, shape (B, T).
        advantage: Advantages, without gradient, shape (B, T).
        response_mask: True where a token counts, shape (B, T). Elsewhere anything may stand,
            NaN and infinity too.
        num_responses: What the sum is divided by: the nominal number of responses.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> logp, advantage = torch.full((2, 2), -1.0), torch.full((2, 2), 2.0)
        >>> policy_gradient_loss(logp, advantage, mask, num_responses=2)
        tensor(3.)
    """
    # Filled, not multiplied by the mask: 0 * inf is NaN, in the value and in the gradient.
    logp = logp.masked_fill(~response_mask, 0)
    return -(advantage.masked_fill(~response_mask, 0) * logp).sum() / num_responses
