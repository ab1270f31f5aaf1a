"""Sample, grid and check preferences: weights on the simplex and the KL strength alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_alpha",
    "check_weights",
    "parse_weights",
    "sample_weights",
    "simplex_grid",
    "write_weights",
]

_NUMBERS = (int, float, np.integer, np.floating)


def sample_weights(
    n: int,
    *,
    num_rewards: int,
    concentration: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights from a symmetric Dirichlet distribution.

    Drawn in the log domain, ``Gamma(c) = Gamma(c + 1) * U ** (1 / c)``, so that a tiny
    concentration gives exact corners and never 0 / 0.

    Args:
        n: Number of rows.
        num_rewards: K.
        concentration: 1 is uniform on the simplex; less favours the corners.
        generator: A CPU generator; the global one if None.

    Returns:
        Float32, shape (n, K); rows are non-negative and sum to 1.

    Raises:
        ValueError: if ``concentration`` is not positive.

    Example:
        >>> sample_weights(5, num_rewards=3).shape
        torch.Size([5, 3])
    """
    if not concentration > 0:
        raise ValueError(f"concentration must be positive, got {concentration}.")
    shape = torch.full((n, num_rewards), concentration + 1.0, dtype=torch.float64)
    # torch.distributions draws with the same function but takes no generator.
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = torch.rand(n, num_rewards, dtype=torch.float64, generator=generator)
    tiny = torch.finfo(torch.float64).tiny
    return (gamma.log() + uniform.clamp_min(tiny).log() / concentration).softmax(-1).float()


def simplex_grid(num_rewards: int, divisions: int) -> Tensor:
    """All weights that are multiples of ``1 / divisions``; the first row is the first corner.

    Args:
        num_rewards: K.
        divisions: Steps along an edge.

    Returns:
        Shape (G, K) with G = (divisions + K - 1) choose (K - 1).

    Raises:
        ValueError: if either argument is below 1.

    Example:
        >>> simplex_grid(2, 2)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]])
        >>> len(simplex_grid(3, 4))
        15
    """
    if num_rewards < 1 or divisions < 1:
        raise ValueError(
            f"A grid needs num_rewards >= 1 and divisions >= 1, got {num_rewards} and {divisions}."
        )
    # Stars and bars: K - 1 bars among `divisions` stars cut them into K counts.
    slots = divisions + num_rewards - 1
    rows = []
    for bars in combinations(range(slots), num_rewards - 1):
        edges = (-1, *bars, slots)
        rows.append([right - left - 1 for left, right in pairwise(edges)])
    return torch.tensor(rows[::-1], dtype=torch.float32) / divisions


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """Named weights as a row in the order of ``names``.

    Args:
        weights: The weight of every reward by its name.
        names: The rewards, in the order of the reward bank.

    Returns:
        Float32, shape (K,), sums to 1.

    Raises:
        ValueError: naming the reward that is unknown, missing, negative or not a number, or
            the sum if it is not 1 (within 1e-5, for rounded decimals).

    Example:
        >>> check_weights({"b": 0.25, "a": 0.75}, ["a", "b"])
        tensor([0.7500, 0.2500])
    """
    known = ", ".join(names)
    for name in weights:
        if name not in names:
            raise ValueError(f"Weight for unknown reward '{name}'; the rewards are: {known}.")
    for name in names:
        if name not in weights:
            raise ValueError(
                f"No weight for reward '{name}'; give one (0 is allowed) for: {known}."
            )
        value = weights[name]
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise ValueError(f"The weight of '{name}' must be a number, got {value!r}.")
        if not 0 <= value < float("inf"):
            raise ValueError(f"The weight of '{name}' must be 0 or more and finite, got {value}.")
    total = sum(weights.values())
    if abs(total - 1) > 1e-5:
        raise ValueError(f"The weights {dict(weights)} must sum to 1, they sum to {total:g}.")
    row = torch.tensor([float(weights[name]) for name in names], dtype=torch.float64)
    return (row / row.sum()).float()


def parse_weights(text: str) -> dict[str, float]:
    """The weights of ``a=.7,b=.3``, as they are written on a command line.

    Raises:
        ValueError: it is not written like that, or names a reward twice.

    Example:
        >>> parse_weights("support=.7, brevity=.3")
        {'support': 0.7, 'brevity': 0.3}
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            raise ValueError(
                f"'{text}' are no weights; write name=number for every reward, with commas: "
                "support=.7,brevity=.3"
            ) from None
        if name in weights:
            raise ValueError(f"'{text}' gives the weight of '{name}' twice.")
        weights[name] = value
    return weights


def write_weights(weights: Mapping[str, float], digits: int) -> str:
    """What ``parse_weights`` reads: rounded, and still summing to 1, at the largest's cost.

    Example:
        >>> write_weights({"support": 1 / 3, "brevity": 1 / 3, "plain": 1 / 3}, 2)
        'support=0.34,brevity=0.33,plain=0.33'
    """
    written = {name: round(float(weight), digits) for name, weight in weights.items()}
    largest = max(written, key=written.__getitem__)
    written[largest] = round(1 - (sum(written.values()) - written[largest]), digits)
    return ",".join(f"{name}={weight:g}" for name, weight in written.items())


def check_alpha(alpha: float) -> float:
    """``alpha`` itself, if it is a KL strength.

    Raises:
        ValueError: if it is not a number in [0, 1].

    Example:
        >>> check_alpha(0.1)
        0.1
    """
    if isinstance(alpha, bool) or not isinstance(alpha, _NUMBERS) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the KL strength, must be a number in [0, 1], got {alpha!r}.")
    return float(alpha)
