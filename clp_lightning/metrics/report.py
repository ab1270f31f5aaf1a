"""What a front says: means per point, gains with their intervals, hypervolume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..functional import (
    consistency,
    cross_fitted_envy,
    has_dial,
    hypervolume,
    mean_inner_product,
    predicted_gain,
    spearman,
    steering_gain,
    value_matrix,
)
from ..keyed import generator
from ..types import Preference
from .bootstrap import Estimate, cluster_means, redraw_within_prompts, resample_counts
from .samples import REFERENCE, FrontSamples, within_prompt_covariance

__all__ = ["FrontReport"]

_DIAL = ("steering_gain", "consistency", "envy")
_SPLITS = 8  # halvings of the prompts that cross-fitted envy is averaged over


class FrontReport:
    """A front with its statistics (docs/method.md, section 6).

    Means are over the samples of a prompt first, then over prompts; a response that a reward
    did not score is left out of that reward's mean.

    Attributes:
        samples: Every response once.
        names: The K rewards.
        grid: G rows.
        reference_point: Of the hypervolume, in normalised rewards, shape (K,).
        means: Of the data and of every resample of the prompts; of the reference and every point;
            see ``FrontSamples.cells``. Shape (R + 1, G + 1, 2K + 3).
        values: V_u(p), the reference as first p, shape (R + 1, G, G + 1).
        resampled: Each statistic on the data and on every resample, shape (R + 1,): value_gain;
            with a dial steering_gain, and consistency and envy even where these say nothing.
    """

    def __init__(
        self,
        samples: FrontSamples,
        names: Sequence[str],
        grid: Preference,
        reference_point: Sequence[float] | None = None,
    ) -> None:
        self.samples = samples.deduplicated()
        self.names = list(names)
        self.grid = Preference(grid.weights.double().cpu(), grid.alpha.double().cpu())
        self.reference_point = torch.tensor(reference_point or [-1.0] * len(names)).double()

        cells = self.samples.cells(len(grid))  # (N, G + 1, 2K + 3)
        self._num_prompts, k = len(cells), len(names)
        # Per column, because a point lacks a prompt only where a run was cut short.
        self._n = (~cells[..., 2 * k].isnan()).sum(0)
        counts = resample_counts(self._num_prompts)
        self.means = cluster_means(cells, counts)
        self._means = self.means[0]
        self.values = self._value_matrix(self.means)
        gains = (self.own_values - self.values[..., 0]).mean(-1)
        self.resampled = {"value_gain": gains}
        self.value_gain = Estimate.of(gains, self._num_prompts)
        self.steering_gain = self.consistency = self.envy = Estimate()
        self.predicted_gain: float | None = None
        if has_dial(self.grid):
            self._judge_dial(cells, counts)
        self.hypervolume = [self._hypervolume(alpha) for alpha in self.grid.alpha.unique()]

    def _value_matrix(self, means: Tensor) -> Tensor:
        """V_u(p) with the reference as first p, shape (..., G, G + 1)."""
        k = len(self.names)
        return value_matrix(means[..., k : 2 * k], means[..., 2 * k], preference=self.grid)

    @property
    def own_values(self) -> Tensor:
        """V_u(p_u), shape (R + 1, G)."""
        return self.values[..., 1:].diagonal(dim1=-2, dim2=-1)

    def _judge_dial(self, cells: Tensor, counts: Tensor) -> None:
        """Steering gain, consistency and envy, each where it is defined."""
        values, gains = self.values[..., 1:], self.resampled["value_gain"]
        self.resampled |= {
            "steering_gain": steering_gain(values),
            "consistency": consistency(values),
            "envy": self._envy(cells, counts),
        }
        estimates = {name: Estimate.of(self.resampled[name], self._num_prompts) for name in _DIAL}
        self.steering_gain = estimates["steering_gain"]
        covariance = within_prompt_covariance(self.samples.at(REFERENCE))
        self.predicted_gain = _number(predicted_gain(self.grid, covariance, gains[0]))
        # Ratios whose denominator may be 0 say nothing.
        if self.steering_gain.excludes_zero():
            self.consistency = estimates["consistency"]
        if self.value_gain.excludes_zero() and gains[0] > 0:
            self.envy = estimates["envy"]

    def _envy(self, cells: Tensor, counts: Tensor) -> Tensor:
        """Cross-fitted envy of every resample, shape (R + 1,)."""
        gains = self.resampled["value_gain"]
        total = torch.zeros_like(gains)
        for split in range(_SPLITS):
            # Prompts are split, not draws: no prompt may stand on both sides.
            order = torch.randperm(self._num_prompts, generator=generator(split))
            first = (order < self._num_prompts // 2).double()
            halves = [
                self._value_matrix(cluster_means(cells, counts * half))[..., 1:]
                for half in (first, 1 - first)
            ]
            total += cross_fitted_envy(halves[0], halves[1], gains)
        return total / _SPLITS

    def points_at(self, alpha: Tensor) -> Tensor:
        """Normalised rewards of the points of one alpha, shape (R + 1, points, K)."""
        k = len(self.names)
        rows = (self.grid.alpha == alpha).nonzero().squeeze(-1)
        return self.means[:, 1 + rows, k : 2 * k]

    def _hypervolume(self, alpha: Tensor) -> dict[str, float | None]:
        """Of the points of one alpha, and of the reference sampled as often as there are points."""
        k = len(self.names)
        points = self.points_at(alpha)[0]
        # The best of G noisy points beats one by chance, so the reference gets G of them too.
        reference = self.samples.at(REFERENCE)
        drawn = []
        for index in redraw_within_prompts(reference.prompt_id, len(points)):
            redrawn = replace(reference, normalized=reference.normalized[index])
            drawn.append(redrawn.cells(0)[:, 0, k : 2 * k].nanmean(0))
        return {
            "alpha": round(alpha.item(), 6),
            "value": _number(hypervolume(points, self.reference_point)),
            "reference": _number(hypervolume(torch.stack(drawn), self.reference_point)),
        }

    def _describe(self, row: int) -> dict[str, Any]:
        """The means of a row of cells, by name."""
        k, means = len(self.names), self._means[row]
        return {
            "rewards": {name: _number(means[i]) for i, name in enumerate(self.names)},
            "normalized": {name: _number(means[k + i]) for i, name in enumerate(self.names)},
            "kl": _number(means[2 * k]),
            "length": _number(means[2 * k + 1]),
            "truncated": _number(means[2 * k + 2]),
        }

    def to_dict(self) -> dict[str, Any]:
        """What front.json says of the front itself; None is undefined."""
        k = len(self.names)
        values, own = self.values[0], self.own_values[0]
        asked = self.grid.to_dicts(self.names)
        points = [
            {
                **asked[u],
                **self._describe(u + 1),
                "value": _number(own[u]),
                "value_reference": _number(values[u, 0]),
                "n": int(self._n[u + 1]),
            }
            for u in range(len(self.grid))
        ]
        rewards = self._means[1:, k : 2 * k]
        metrics = {
            "value_gain": asdict(self.value_gain),
            "steering_gain": asdict(self.steering_gain) | {"predicted": self.predicted_gain},
            "consistency": asdict(self.consistency),
            "envy": asdict(self.envy),
            "hypervolume": self.hypervolume,
            "mip": _number(mean_inner_product(rewards, self.grid.weights)),
            "spearman": {
                name: _number(spearman(self.grid.weights[:, i], rewards[:, i]))
                for i, name in enumerate(self.names)
            },
        }
        return {
            "schema": 1,
            "rewards": self.names,
            "reference_point": self.reference_point.tolist(),
            "points": points,
            "reference": {**self._describe(0), "n": int(self._n[0])},
            "metrics": metrics,
        }

    def scalars(self) -> dict[str, float]:
        """Numbers for ``self.log``, under stable names; NaN is undefined."""
        k = len(self.names)
        volumes = [_float(volume["value"]) for volume in self.hypervolume]
        numbers = {
            "value": _number(self.own_values[0].mean()),
            "value_gain": self.value_gain.mean,
            "steering_gain": self.steering_gain.mean,
            "consistency": self.consistency.mean,
            "envy": self.envy.mean,
            "hypervolume": sum(volumes) / len(volumes),
            "kl": _number(self._means[1:, 2 * k].mean()),
            "length": _number(self._means[1:, 2 * k + 1].mean()),
            "truncated": _number(self._means[1:, 2 * k + 2].mean()),
        }
        return {name: _float(value) for name, value in numbers.items()}


def _number(value: Tensor) -> float | None:
    """A plain number; None for NaN."""
    return None if value.isnan() else value.item()


def _float(value: float | None) -> float:
    """A plain number; NaN for None."""
    return math.nan if value is None else value
