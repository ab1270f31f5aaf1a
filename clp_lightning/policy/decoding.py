"""Decode-time rivals: mixtures of log-probabilities of one trained policy's corners."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import check_alpha
from ..types import Preference
from .policy import Policy
from .rollout import TransformersEngine

__all__ = ["MOD", "DeRa"]


class MOD(TransformersEngine):
    """Multi-objective decoding: the geometric mixture of the K single-reward policies.

    ``log pi(y_t) = sum_i w_i log pi(y_t | corner i) + const``, token by token (Shi et al., 2024).
    The corners are the policy under one-hot weights, at the alpha that is asked for. For
    evaluation: what it samples from is no policy that could be trained.
    """

    on_policy = False

    def voices(self, policy: Policy, preference: Preference) -> tuple[Preference, Tensor | None]:
        _check_prompts_alike(policy, self)
        k = preference.num_rewards
        corners = torch.eye(k).to(preference.weights).repeat(len(preference), 1)
        return Preference(corners, preference.alpha.repeat_interleave(k)), preference.weights


class DeRa(TransformersEngine):
    """Decoding-time realignment: another alpha by mixing the reference in.

    ``log pi_alpha = (1 - lambda) log pi_ref + lambda log pi_alpha_min + const`` with
    ``lambda = (alpha_min / (1 - alpha_min)) (1 - alpha) / alpha`` (Liu et al., 2024;
    docs/method.md, section 5), for the policy trained at the smallest alpha. For evaluation, as
    ``MOD``.

    Args:
        alpha_min: KL strength of the policy that is mixed with the reference; in (0, 1).
    """

    on_policy = False

    def __init__(self, alpha_min: float = 0.05) -> None:
        if not 0 < check_alpha(alpha_min) < 1:
            raise ValueError(f"alpha_min must lie in (0, 1); got {alpha_min}.")
        super().__init__()
        self.alpha_min = alpha_min

    def voices(self, policy: Policy, preference: Preference) -> tuple[Preference, Tensor | None]:
        _check_prompts_alike(policy, self)
        if bool((preference.alpha <= 0).any()):
            raise ValueError("DeRa needs alpha above 0: at 0 the mixture has no limit.")
        reference = torch.ones_like(preference.alpha)
        zero = policy.conditioner.coefficients(Preference(preference.weights, reference))
        if bool((zero != 0).any()):
            raise ValueError(
                "DeRa mixes with the reference, which is alpha = 1 only with coefficients that "
                "vanish there; use Scaled() with shared='scaled'."
            )
        smallest = torch.full_like(preference.alpha, self.alpha_min)
        both = torch.stack([reference, smallest], dim=-1).flatten()  # (P * 2,)
        share = self.alpha_min / (1 - self.alpha_min) * (1 - preference.alpha) / preference.alpha
        return (
            Preference(preference.weights.repeat_interleave(2, 0), both),
            torch.stack([1 - share, share], dim=-1),
        )


def _check_prompts_alike(policy: Policy, engine: TransformersEngine) -> None:
    if policy.conditioner.rewrites:
        raise ValueError(
            f"{type(engine).__name__} mixes policies that read the same prompt, and "
            f"{type(policy.conditioner).__name__} writes the preference into it; use "
            "TransformersEngine."
        )
