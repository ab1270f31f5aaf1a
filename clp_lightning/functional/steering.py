"""Does the dial do what it says? Steering gain, consistency and envy (docs/method.md, section 6).

Preferences are written u = ((1 - alpha) w, alpha) and what a policy reaches f = (R_1 .. R_K, -KL),
so that V_u(p) = u . f(p). Everything here is read off the matrix of all V_u(p_u').
Leading dimensions (``...``) are bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..types import Preference

__all__ = [
    "consistency",
    "cross_fitted_envy",
    "dial_criteria",
    "dial_passes",
    "envy",
    "has_dial",
    "predicted_gain",
    "steering_gain",
    "value_matrix",
]


def value_matrix(rewards: Tensor, kl: Tensor, *, preference: Preference) -> Tensor:
    """The value of every point of a front for every preference.

    Args:
        rewards: Mean rewards of the points, shape (..., P, K). A NaN (never scored) makes the
            value NaN, but not for a preference that gives this reward weight 0.
        kl: Mean KL of the points, nats per response, shape (..., P).
        preference: U rows.

    Returns:
        V_u(p), shape (..., U, P).

    Example:
        >>> preference = Preference(torch.eye(2), torch.zeros(2))
        >>> value_matrix(torch.tensor([[1.0, 2.0]]), torch.tensor([0.0]), preference=preference)
        tensor([[1.],
                [2.]])
    """
    alpha = preference.alpha.to(rewards).unsqueeze(-1)
    u = torch.cat([(1 - alpha) * preference.weights.to(rewards), alpha], -1)
    f = torch.cat([rewards, -kl.unsqueeze(-1)], -1).transpose(-1, -2)
    missing = f.isnan()
    if not missing.any():
        return u @ f
    unknown = (u != 0).to(f) @ missing.to(f) > 0
    return (u @ f.masked_fill(missing, 0)).masked_fill(unknown, float("nan"))


def has_dial(preference: Preference) -> bool:
    """Whether the preferences differ; K = 1 with one alpha leaves nothing to steer.

    Example:
        >>> has_dial(Preference(torch.ones(2, 1), torch.tensor([0.1, 0.1])))
        False
    """
    rows = torch.cat([preference.weights, preference.alpha.unsqueeze(-1)], -1)
    return bool((rows != rows[:1]).any())


def steering_gain(values: Tensor) -> Tensor:
    """How much the dial is worth: own policy against a random one of the front.

    G = mean_u V_u(p_u) - mean_{u,u'} V_u(p_u') = sum_k Cov_u(u_k, f_k). Linear in the data, so
    unbiased; 0 for a dial that does nothing, negative for a reversed one.

    Args:
        values: V_u(p_u'), shape (..., U, U).

    Returns:
        Shape (...).

    Example:
        >>> steering_gain(torch.eye(2))
        tensor(0.5000)
    """
    return values.diagonal(dim1=-2, dim2=-1).mean(-1) - values.mean((-1, -2))


def consistency(values: Tensor) -> Tensor:
    """Share of the pairwise steering that goes the right way.

    Sum of positive parts over sum of absolute values of (u - u') . (f(p_u) - f(p_u')), which
    is never negative where every preference has the policy that serves it best.

    Args:
        values: V_u(p_u'), shape (..., U, U).

    Returns:
        Shape (...), in [0, 1]; NaN where the policies do not differ.

    Example:
        >>> consistency(torch.eye(2)), consistency(1 - torch.eye(2))
        (tensor(1.), tensor(0.))
    """
    own = values.diagonal(dim1=-2, dim2=-1)
    pairs = own.unsqueeze(-1) + own.unsqueeze(-2) - values - values.transpose(-1, -2)
    return pairs.clamp_min(0).sum((-1, -2)) / pairs.abs().sum((-1, -2))


def envy(values: Tensor, value_gain: Tensor) -> Tensor:
    """How much better another preference's policy would serve, as a share of the value gain.

    mean_u [max_u' V_u(p_u') - V_u(p_u)] / (Vbar - Vbar_ref). For exact values; on sampled ones the
    maximum picks noise, so see ``cross_fitted_envy``.

    Args:
        values: V_u(p_u'), shape (..., U, U).
        value_gain: Vbar - Vbar_ref, shape (...).

    Returns:
        Shape (...); 0 at the optimum.

    Example:
        >>> envy(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor(1.0))
        tensor(0.5000)
    """
    own = values.diagonal(dim1=-2, dim2=-1)
    return (values.amax(-1) - own).mean(-1) / value_gain


def cross_fitted_envy(first: Tensor, second: Tensor, value_gain: Tensor) -> Tensor:
    """Envy without the luck of the maximum: u' chosen on one half, its value read on the other.

    Args:
        first: V_u(p_u') on half of the prompts, shape (..., U, U).
        second: The same on the other half.
        value_gain: Vbar - Vbar_ref on all prompts, shape (...).

    Returns:
        Shape (...), the mean of both ways round; negative where luck was all there was.

    Example:
        >>> first, second = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(2)
        >>> cross_fitted_envy(first, second, torch.tensor(1.0))
        tensor(-0.2500)
    """
    total = torch.zeros_like(value_gain)
    for chosen, read in ((first, second), (second, first)):
        best = read.gather(-1, chosen.argmax(-1, keepdim=True)).squeeze(-1)
        total = total + (best - read.diagonal(dim1=-2, dim2=-1)).mean(-1)
    return total / 2 / value_gain


def predicted_gain(preference: Preference, covariance: Tensor, value_gain: Tensor) -> Tensor:
    """The natural size G0 of the steering gain, given how much value was gained.

    For a small tilt of the reference the optimum moves linearly: with beta = alpha / (1 - alpha),
    f_lin(u) = (C w / beta, -w'Cw / (2 beta^2)). G0 = G(f_lin) / V(f_lin) * (Vbar - Vbar_ref);
    with one alpha that is 2 tr(Cov(w) C) / mean(w'Cw) * (Vbar - Vbar_ref).

    Args:
        preference: U rows.
        covariance: C, mean within-prompt covariance of the normalised rewards under the
            reference, shape (K, K).
        value_gain: Vbar - Vbar_ref, a scalar.

    Returns:
        A scalar; NaN where the rewards do not vary, or where some of several alphas are 0 (a
        tilt without limit).

    Example:
        >>> preference = Preference(torch.eye(2), torch.full((2,), 0.1))
        >>> predicted_gain(preference, torch.eye(2), torch.tensor(1.0))
        tensor(1.)
    """
    weights, alpha = preference.weights.to(covariance), preference.alpha.to(covariance)
    # One alpha cancels, whatever it is: any will do, and 0 and 1 need no special case.
    alpha = torch.full_like(alpha, 0.5) if bool((alpha == alpha[0]).all()) else alpha
    beta = (alpha / (1 - alpha)).unsqueeze(-1)
    shift = weights @ covariance / beta
    kl = (weights * shift / beta).sum(-1) / 2
    if not bool((shift.isfinite().all()) & kl.isfinite().all()):
        return value_gain.new_full((), float("nan"))
    values = value_matrix(shift, kl, preference=Preference(weights, alpha))
    return steering_gain(values) / values.diagonal().mean() * value_gain


def dial_criteria(metrics: Mapping[str, Any]) -> dict[str, bool]:
    """The four criteria of a working dial; what is undefined (None) is not met.

    Args:
        metrics: The "metrics" of a front.json.

    Returns:
        value_gain: its lower 95 % bound is above 0.
        steering_gain: its lower bound is above 0 and it is at least a quarter of the predicted.
        consistency: its lower bound is at least 0.95.
        envy: cross-fitted, at most 0.05.

    Example:
        >>> estimate = {"mean": 1.0, "low": 0.9, "high": 1.0}
        >>> dial_criteria({"value_gain": estimate, "steering_gain": estimate | {"predicted": 2.0},
        ...                "consistency": estimate, "envy": None})
        {'value_gain': True, 'steering_gain': True, 'consistency': False, 'envy': False}
    """

    def number(metric: str, part: str) -> float:
        value = (metrics.get(metric) or {}).get(part)
        return float("nan") if value is None else float(value)

    return {
        "value_gain": number("value_gain", "low") > 0,
        "steering_gain": number("steering_gain", "low") > 0
        and number("steering_gain", "mean") >= 0.25 * number("steering_gain", "predicted"),
        "consistency": number("consistency", "low") >= 0.95,
        "envy": number("envy", "mean") <= 0.05,
    }


def dial_passes(front: Mapping[str, Any]) -> bool:
    """Whether the dial of a front (the contents of a front.json) meets all four criteria."""
    return all(dial_criteria(front["metrics"]).values())
