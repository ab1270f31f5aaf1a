"""Refusing fronts that cannot be compared, and bringing the others to one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..metrics.samples import REFERENCE, FrontSamples
from .runs import Point, Run

__all__ = ["check_alike", "in_units", "on_grid", "reference_warnings", "statistics"]

_SAME_UNITS = 1e-4  # relative: fronts keep float32
_SIGMAS, _FEWEST = 5.0, 20

Statistics = list[tuple[float, float] | None]
"""Mean and deviation of every reward; None if it does not vary."""


def check_alike(first: Run, run: Run, *, grid: bool = True) -> None:
    """Refuses ``run`` if it cannot be compared with ``first``.

    Args:
        first: A run.
        run: Another, its rewards in any order.
        grid: Whether the points must be the same.

    Raises:
        ValueError: says what differs.
    """
    if sorted(run.names) != sorted(first.names):
        raise _unlike(first, run, "rewards", first.names, run.names)
    for key in sorted(run.decoding.keys() | first.decoding.keys()):
        own, other = (each.decoding.get(key) for each in (run, first))
        if own != other:
            raise _unlike(first, run, f"decodings ({key})", other, own)
    if grid:
        _check_grid(first, run)
    ids = [set(each.samples.prompt_id.tolist()) for each in (first, run)]
    if ids[0] != ids[1]:
        counts = [f"{len(own)} prompts" for own in ids]
        common = f" ({len(ids[0] & ids[1])} in both)"
        raise _unlike(first, run, "prompts", counts[0], counts[1] + common)


def _check_grid(first: Run, run: Run) -> None:
    own = {named(point, run.names) for point in run.points}
    wanted = {named(point, first.names) for point in first.points}
    if own != wanted:
        said = [f"{len(each)} points" for each in (wanted, own)]
        only = [sorted(some)[0] for some in (wanted - own, own - wanted) if some]
        raise _unlike(first, run, "grids", said[0], f"{said[1]}, only one has {only[0]}")


def _unlike(first: Run, run: Run, what: str, one: Any, two: Any) -> ValueError:
    return ValueError(
        f"{first.name} and {run.name} cannot be compared, their {what} differ: {one} and {two}."
    )


def named(point: Point, names: Sequence[str]) -> str:
    """A point, whatever the order of the rewards.

    Example:
        >>> named((0.25, 0.75, 0.1), ["short", "kind"])
        '(kind 0.75, short 0.25, alpha 0.1)'
    """
    weights = sorted(zip(names, point[:-1], strict=True))
    shown = ", ".join(f"{name} {weight:g}" for name, weight in weights)
    return f"({shown}, alpha {point[-1]:g})"


def on_grid(run: Run, first: Run) -> Run:
    """``run`` with its points in the order of ``first``, rewards too."""
    place = {named(point, first.names): row for row, point in enumerate(first.points)}
    target = torch.tensor([place[named(point, run.names)] for point in run.points])
    point = run.samples.point
    moved = torch.where(point == REFERENCE, REFERENCE, target[point.clamp_min(0)])
    gaps = {name: gap[target.argsort()] for name, gap in run.gaps.items()}
    return replace(run, grid=first.grid, gaps=gaps, samples=replace(run.samples, point=moved))


def statistics(samples: FrontSamples) -> Statistics:
    """What a front's rewards were normalised with: normalised = (raw - mean) / deviation."""
    found: Statistics = []
    for raw, normalized in zip(samples.rewards.T, samples.normalized.T, strict=True):
        seen = raw.isfinite()
        x, y = raw[seen], normalized[seen]
        spread = x - x.mean()
        if len(x) == 0 or bool((spread == 0).all()):
            found.append(None)
            continue
        std = float(spread.square().sum() / (spread * y).sum())
        found.append((float(x.mean() - std * y.mean()), std))
    return found


def in_units(run: Run, first: Run, units: Statistics) -> tuple[Run, dict[str, tuple[float, float]]]:
    """``run`` with the order of rewards of ``first``, normalised like it.

    Args:
        run: A run.
        first: Another.
        units: The statistics of ``first``.

    Returns:
        The run, and its own statistics of the rewards for which these were others.

    Raises:
        ValueError: the normalisation of ``first`` cannot be told.
    """
    order = [run.names.index(name) for name in first.names]
    raw, normalized = run.samples.rewards[:, order], run.samples.normalized[:, order].clone()
    samples = replace(run.samples, rewards=raw, normalized=normalized)
    others = {}
    for k, (name, wanted, own) in enumerate(
        zip(first.names, units, statistics(samples), strict=True)
    ):
        if wanted is None:
            _check_constant(first, samples, k, name)
        elif own is None or not _same(wanted, own):
            normalized[:, k] = (raw[:, k] - wanted[0]) / wanted[1]
            if own is not None:
                others[name] = own
    grid = replace(run.grid, weights=run.grid.weights[:, order])
    return replace(run, names=first.names, grid=grid, samples=samples), others


def _same(one: tuple[float, float], two: tuple[float, float]) -> bool:
    shift, stretch = (two[0] - one[0]) / one[1], math.log(two[1] / one[1])
    return max(abs(shift), abs(stretch)) < _SAME_UNITS


def _check_constant(first: Run, samples: FrontSamples, k: int, name: str) -> None:
    """Where the first front does not vary, only its own value has a normalised one."""
    pairs = [
        each[each[:, 0].isfinite()].unique(dim=0)
        for each in (
            torch.stack([s.rewards[:, k], s.normalized[:, k]], -1) for s in (first.samples, samples)
        )
    ]
    if not torch.equal(*pairs):
        raise ValueError(
            f"Reward '{name}' is the same for all responses of {first.name}, so its normalisation "
            "cannot be told: put another run first."
        )


def reference_warnings(first: Run, run: Run) -> list[str]:
    """Whether the references are others, or answered the prompts differently, beyond chance.

    Prompts are told apart by their row numbers only, so this may be another data set.
    """
    if None not in (run.base, first.base) and run.base != first.base:
        return [
            f"{run.name} and {first.name} were trained from different bases, so each is measured "
            "against a reference of its own."
        ]
    k = len(first.names)
    own, other = (each.samples.cells(len(each.grid))[:, 0, :k] for each in (run, first))
    found = []
    for name, column in zip(first.names, (own - other).T, strict=True):
        each: Tensor = column[column.isfinite()]
        if len(each) < _FEWEST:
            continue
        mean, error = float(each.mean()), float(each.std()) / len(each) ** 0.5
        if abs(mean) > _SIGMAS * error:
            found.append(
                f"The references of {run.name} and {first.name} differ in '{name}' by {mean:.3g}, "
                f"{abs(mean) / error:.0f} standard errors: another base, other prompts or another "
                "reward?"
            )
    return found
