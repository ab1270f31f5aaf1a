"""The best that a policy can do, in closed form, and how much of it a policy reaches.

``G`` counts preferences, ``X`` contexts, ``S`` responses, ``K`` rewards. Everything is float64.
Formulas: docs/method.md, section 4.
"""

from __future__ import annotations

from torch import Tensor

from ..types import Preference

__all__ = ["MAX_ALPHA", "closed_gap", "exact_value", "optimum"]

MAX_ALPHA = 0.5
"""Above it V* - V_ref is too small for the closed gap to say anything."""


def _tilt(rewards: Tensor, preference: Preference) -> tuple[Tensor, Tensor]:
    """The reward's part of V, (G, X, S), and alpha, (G, 1, 1)."""
    weights, alpha = preference.weights.to(rewards), preference.alpha.to(rewards)[:, None, None]
    return (1 - alpha) * (rewards @ weights.T).movedim(-1, 0), alpha


def optimum(ref_logp: Tensor, rewards: Tensor, preference: Preference) -> tuple[Tensor, Tensor]:
    """V* and the policy that attains it: pi* is pi_ref * exp((1 - alpha) w.R / alpha), normalised.

    Args:
        ref_logp: Log-probability of every response under the reference, shape (X, S).
        rewards: Every reward of every response, shape (X, S, K).
        preference: G rows.

    Returns:
        V*, shape (G, X), and log pi*, shape (G, X, S).

    Raises:
        ValueError: where an alpha is not above 0: the optimum is no distribution then.

    Example:
        >>> import torch
        >>> half = torch.full((1, 2), 0.5, dtype=torch.float64).log()
        >>> rewards = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
        >>> best, logp = optimum(half, rewards, Preference.single([1.0], 0.5))
        >>> [round(p, 4) for p in logp[0, 0].exp().tolist()]  # e / (e + 1)
        [0.7311, 0.2689]
    """
    if not (preference.alpha > 0).all():
        raise ValueError("The optimum has a closed form only where alpha is above 0.")
    reward, alpha = _tilt(rewards, preference)
    tilted = ref_logp + reward / alpha
    log_norm = tilted.logsumexp(-1, keepdim=True)
    return (alpha * log_norm).squeeze(-1), tilted - log_norm


def exact_value(logp: Tensor, ref_logp: Tensor, rewards: Tensor, preference: Preference) -> Tensor:
    """V of a policy, summed over every response; differentiable in ``logp``.

    Args:
        logp: Log-probability of every response under the policy, shape (G, X, S).
        ref_logp: The same under the reference, shape (X, S).
        rewards: Every reward of every response, shape (X, S, K).
        preference: G rows.

    Returns:
        V, shape (G, X).
    """
    reward, alpha = _tilt(rewards, preference)
    return (logp.exp() * (reward - alpha * (logp - ref_logp))).sum(-1)


def closed_gap(logp: Tensor, ref_logp: Tensor, rewards: Tensor, preference: Preference) -> Tensor:
    """(V - V_ref) / (V* - V_ref): 0 for the reference, 1 for the optimum and never more.

    Each V is a mean over contexts before the division. Arguments as in ``exact_value``.

    Returns:
        Shape (G,).

    Raises:
        ValueError: where an alpha is not in (0, 0.5].
    """
    if not ((preference.alpha > 0) & (preference.alpha <= MAX_ALPHA)).all():
        raise ValueError(
            f"The closed gap is defined for alpha in (0, {MAX_ALPHA}], not for "
            f"{preference.alpha.tolist()}."
        )
    value = exact_value(logp, ref_logp, rewards, preference).mean(-1)
    start = exact_value(ref_logp.expand_as(logp), ref_logp, rewards, preference).mean(-1)
    best = optimum(ref_logp, rewards, preference)[0].mean(-1)
    return (value - start) / (best - start)
