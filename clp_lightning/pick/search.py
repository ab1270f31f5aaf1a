"""Search over (w, alpha): the most of one quantity under floors and ceilings on others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..types import Preference
from .measure import Measured, Meter

__all__ = ["Wish", "find_preference", "parse_wishes"]

_WISH = re.compile(r"\s*([\w-]+)\s*(>=|<=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_NEVER = 1e6
"""Units that are missing where nothing was scored: finite, so that the search can compare."""


@dataclass
class Wish:
    """A floor or a ceiling.

    Attributes:
        quantity: Name of a reward (raw), ``kl`` (nats per response) or ``length`` (tokens).
        at_least: Whether ``bound`` is a floor.
        bound: Of the mean over prompts.
    """

    quantity: str
    at_least: bool
    bound: float

    def shortfall(self, value: float | Tensor) -> float | Tensor:
        """By how much ``value`` misses; not above 0 where it does not.

        Example:
            >>> Wish("support", True, 0.5).shortfall(0.25)
            0.25
        """
        return self.bound - value if self.at_least else value - self.bound

    def __str__(self) -> str:
        return f"{self.quantity}{'>=' if self.at_least else '<='}{self.bound:g}"


def parse_wishes(text: str, quantities: Sequence[str]) -> list[Wish]:
    """The wishes of ``support>=0.5, kl<=6``.

    Raises:
        ValueError: it is not written like that, or names something that is not measured.

    Example:
        >>> [str(wish) for wish in parse_wishes("support >= .5, kl<=6", ["support", "kl"])]
        ['support>=0.5', 'kl<=6']
    """
    wishes = []
    for part in text.split(",") if text.strip() else []:
        found = _WISH.fullmatch(part)
        if found is None:
            raise ValueError(
                f"'{part.strip()}' is no wish; write NAME>=NUMBER or NAME<=NUMBER, with commas "
                "between several."
            )
        check_quantity(found[1], quantities)
        wishes.append(Wish(found[1], found[2] == ">=", float(found[3])))
    return wishes


def check_quantity(name: str, quantities: Sequence[str]) -> None:
    """Refuses a name that is not measured.

    Raises:
        ValueError: naming those that are.
    """
    if name not in quantities:
        raise ValueError(f"'{name}' is not measured; there are: {', '.join(quantities)}.")


class _Scale:
    """Orders what was measured: first by how much is missing, then by what is maximised.

    A wish should be met by ``margin`` standard errors: a mean that only just meets it here would
    miss it on half of all other prompts. Where nothing has that margin, what meets all wishes
    without it still comes before what meets some of them well.
    """

    def __init__(
        self, quantities: Sequence[str], maximize: str, wishes: Sequence[Wish], margin: float
    ) -> None:
        self.target = quantities.index(maximize)
        self.columns = [quantities.index(wish.quantity) for wish in wishes]
        self.wishes, self.margin = list(wishes), margin
        self.unit = torch.ones(len(quantities), dtype=torch.float64)

    def fit(self, measured: Sequence[Measured]) -> None:
        """Measures every quantity in units of what it varies by."""
        means = torch.stack([m.means for m in measured])
        spread = (means - means.nanmean(0)).square().nanmean(0).sqrt()
        noise = torch.stack([m.errors for m in measured]).nanmean(0)
        unit = torch.maximum(spread, noise)
        self.unit = torch.where(unit > 0, unit, 1.0)

    def shortfalls(self, m: Measured, wider: float = 1.0) -> Tensor:
        """Of every wish, margin included, in units; not above 0 where it is met."""
        missing = [
            (wish.shortfall(m.means[i]) + wider * self.margin * m.errors[i]) / self.unit[i]
            for wish, i in zip(self.wishes, self.columns, strict=True)
        ]
        found = [torch.as_tensor(x) for x in missing]
        return torch.stack(found).nan_to_num(_NEVER) if found else torch.zeros(0)

    def gain(self, m: Measured) -> float:
        """What is maximised, in units."""
        return float((m.means[self.target] / self.unit[self.target]).nan_to_num(-_NEVER))

    def key(self, m: Measured, wider: float = 1.0) -> tuple[float, float, float]:
        """Smaller is better; ``wider`` multiplies the margin."""
        bare, safe = (float(self.shortfalls(m, w).clamp(min=0).sum()) for w in (0.0, wider))
        return bare, safe, -self.gain(m)

    def finalists(self, measured: Sequence[Measured]) -> list[Measured]:
        """The best for this margin, without it and for wider ones, each once."""
        best = [min(measured, key=partial(self.key, wider=factor)) for factor in (1, 0, 2, 3)]
        return [m for i, m in enumerate(best) if not any(m is other for other in best[:i])]


def find_preference(
    meter: Meter,
    confirm: Meter,
    maximize: str,
    wishes: Sequence[Wish],
    starts: Preference,
    alphas: tuple[float, float],
    *,
    evaluations: int = 16,
    margin: float = 1.64,
) -> list[Measured]:
    """Everything that was measured on the way, best first.

    The starts are measured, then the best of them is improved by COBYQA (Ragonneau and Zhang,
    2022; SciPy's), which needs no gradients and knows constraints. The best of many noisy numbers
    is too good to be true, so the best few are measured on other prompts too, which decide.

    Args:
        meter: Measures preferences in the search.
        confirm: Measures the best few on other prompts.
        maximize: The quantity to have most of.
        wishes: Floors and ceilings on others.
        starts: Preferences to begin with.
        alphas: Least and largest alpha to consider.
        evaluations: Limit of preferences to measure after the starts.
        margin: Standard errors by which a mean must be better than its bound.
    """
    try:
        from scipy.optimize import NonlinearConstraint, minimize
    except ModuleNotFoundError as error:
        message = 'pick needs SciPy: pip install "clp_lightning[pick]"'
        raise ModuleNotFoundError(message) from error

    scale = _Scale(meter.quantities, maximize, wishes, margin)
    measured = meter.measure(starts)
    scale.fit(measured)
    best = min(measured, key=scale.key)
    known = {_key(m.preference): m for m in measured}

    def at(x: np.ndarray) -> Measured:
        preference = _from_coordinates(x, starts.num_rewards, alphas)
        key = _key(preference)
        if key not in known:
            (known[key],) = meter.measure(preference)
        return known[key]

    place = _to_coordinates(best.preference, alphas)
    if evaluations and len(place):
        within = [_simplex(len(place), starts.num_rewards)]
        if wishes:
            within.append(NonlinearConstraint(lambda x: scale.shortfalls(at(x)), -np.inf, 0))
        minimize(
            lambda x: -scale.gain(at(x)),
            place,
            method="COBYQA",
            bounds=[(0, 1)] * len(place),
            constraints=within,
            options={"initial_tr_radius": 0.2, "final_tr_radius": 0.01, "maxfev": evaluations},
        )
    everything = sorted(known.values(), key=scale.key)
    finalists = scale.finalists(everything)
    others = [m for m in everything if not any(m is other for other in finalists)]
    again = confirm.measure(Preference.cat([m.preference for m in finalists]))
    pooled = [
        Measured(m.preference, torch.cat([m.cells, further.cells]))
        for m, further in zip(finalists, again, strict=True)
    ]
    return [*sorted(pooled, key=scale.key), *others]


# -- coordinates: all weights but the last, then the place of alpha in its range ----------------


def _key(preference: Preference) -> tuple[float, ...]:
    numbers = [*preference.weights[0].tolist(), float(preference.alpha[0])]
    return tuple(round(number, 4) for number in numbers)


def _to_coordinates(preference: Preference, alphas: tuple[float, float]) -> np.ndarray:
    low, high = alphas
    weights = preference.weights[0, :-1].double().tolist()
    place = [(float(preference.alpha[0]) - low) / (high - low)] if high > low else []
    return np.array([*weights, *place])


def _from_coordinates(x: np.ndarray, k: int, alphas: tuple[float, float]) -> Preference:
    """The nearest preference, because the search may step over the edge."""
    weights = x[: k - 1].clip(0, 1)
    weights = weights / max(1.0, weights.sum())
    low, high = alphas
    alpha = low + float(x[k - 1].clip(0, 1)) * (high - low) if high > low else low
    row = torch.tensor([*weights, max(0.0, 1 - weights.sum())]).round(decimals=3)
    return Preference.single(row / row.sum(), round(alpha, 4))


def _simplex(length: int, k: int) -> Any:
    """The first K - 1 weights sum to no more than 1."""
    from scipy.optimize import LinearConstraint

    return LinearConstraint([[float(i < k - 1) for i in range(length)]], -np.inf, 1)
