"""The numbers of a comparison: every statistic of every method, with seeds in its interval."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..functional import hypervolume
from ..metrics import Estimate, FrontReport
from ..metrics.bootstrap import resample_counts
from .permutation import permutation_test
from .read import Compared
from .runs import GAPS, Method

__all__ = ["compare_methods"]

_SEEDS = 1  # key of the draws of seeds


class _Judged:
    """A method with the reports of its runs, and how often each resample draws each run.

    Seeds are drawn with replacement, then prompts. All runs answered the same prompts, so a
    resample has one draw of prompts for all runs of all methods: differences are paired. Seeds are
    drawn method by method.
    """

    def __init__(self, method: Method, reports: Sequence[FrontReport]) -> None:
        self.label, self.runs, self.reports = method.label, method.runs, reports
        self.grid, self.names = method.runs[0].grid, method.runs[0].names
        self.reference_point = reports[0].reference_point
        self.num_prompts = len(method.runs[0].samples.prompt_id.unique())
        # By label, so that a method's intervals do not depend on what stands beside it.
        key = zlib.crc32(method.label.encode())
        self.shares = resample_counts(len(method.runs), _SEEDS, key) / len(method.runs)

    def mean(self, per_run: Sequence[Tensor]) -> Tensor:
        """Mean over the runs that each resample draws, (R + 1, ...) each and in all."""
        numbers = torch.stack(list(per_run), 1)
        shares = self.shares.reshape(*self.shares.shape, *[1] * (numbers.ndim - 2))
        # What was not drawn may be undefined.
        return torch.where(shares > 0, shares * numbers, 0).sum(1)

    def estimate(self, per_run: Sequence[Tensor]) -> Estimate:
        """Of a number on the data and on every resample of the prompts, (R + 1,) each."""
        return Estimate.of(self.mean(per_run), self.num_prompts)

    def over_seeds(self, per_run: Tensor) -> Estimate:
        """Of a number that is exact within a run, shape (S,): only seeds are drawn."""
        values = self.mean(list(per_run.expand(len(self.shares), -1).unbind(-1)))
        return Estimate.of(values, len(per_run))

    @property
    def values(self) -> Tensor:
        """V_u(p_u), shape (R + 1, G)."""
        return self.mean([report.own_values for report in self.reports])

    def volumes(self, alpha: Tensor) -> Tensor:
        """Hypervolume of the points of one alpha, shape (R + 1,)."""
        point = self.reference_point
        return self.mean([hypervolume(report.points_at(alpha), point) for report in self.reports])

    def cells(self, alpha: Tensor) -> Tensor:
        """Normalised rewards per run, prompt and point of one alpha, shape (S, N, points, K)."""
        k = len(self.names)
        rows = 1 + (self.grid.alpha == alpha).nonzero().squeeze(-1)
        each = [run.samples.cells(len(self.grid))[:, rows, k : 2 * k] for run in self.runs]
        return torch.stack(each)

    @property
    def gaps(self) -> dict[str, Tensor]:
        """Those of ``GAPS`` that all runs know, of every run at every point, (S, G) each."""
        common = [name for name in GAPS if all(name in run.gaps for run in self.runs)]
        return {name: torch.stack([run.gaps[name] for run in self.runs]) for name in common}


class _Reference:
    """What the references of all runs do on average: one baseline for all methods.

    With each run's own, value gains would differ by the noise of their references' samples.
    """

    def __init__(self, reports: Sequence[FrontReport]) -> None:
        self.reports = reports
        self.values = torch.stack([r.values[..., 0] for r in reports]).mean(0)  # (R + 1, G)

    def describe(self) -> dict[str, Any]:
        """Mean rewards and length, and hypervolume by alpha."""
        names = self.reports[0].names
        means = torch.stack([report.means[0, 0] for report in self.reports]).mean(0)
        volumes = zip(*[report.hypervolume for report in self.reports], strict=True)
        return {
            "rewards": {name: _number(means[i]) for i, name in enumerate(names)},
            "length": _number(means[2 * len(names) + 1]),
            "hypervolume": [_mean([each["reference"] for each in volume]) for volume in volumes],
        }


def compare_methods(compared: Compared, against: str | None = None) -> dict[str, Any]:
    """The contents of compare.json.

    Args:
        compared: The methods.
        against: Label of the method that the others are tested against; the first if None.

    Raises:
        ValueError: if no method is called ``against``.
    """
    methods = compared.methods
    labels = [method.label for method in methods]
    if against is not None and against not in labels:
        raise ValueError(f"There is no '{against}' to test against; there are {', '.join(labels)}.")
    first = methods[0].runs[0]
    judged = [
        _Judged(
            method,
            [FrontReport(r.samples, r.names, r.grid, first.reference_point) for r in method.runs],
        )
        for method in methods
    ]
    reference = _Reference([report for method in judged for report in method.reports])
    base = judged[labels.index(against) if against is not None else 0]
    return {
        "schema": 1,
        "rewards": first.names,
        "decoding": first.decoding,
        "prompts": judged[0].num_prompts,
        "reference_point": first.reference_point,
        "units": {
            "run": first.name,
            "statistics": dict(zip(first.names, compared.units, strict=True)),
            "renormalized": compared.renormalized,
        },
        "against": base.label,
        "reference": reference.describe(),
        "methods": [_describe(method, base, reference) for method in judged],
        "warnings": compared.warnings,
    }


def _describe(method: _Judged, base: _Judged, reference: _Reference) -> dict[str, Any]:
    """Everything about one method; "difference" is its own less that of ``base``."""
    return {
        "label": method.label,
        "runs": [{"name": run.name, "seed": run.seed, "engine": run.engine} for run in method.runs],
        "metrics": {
            name: asdict(number) for name, number in _metrics(method, base, reference).items()
        },
        **{f"{name}_by_seed": _by_seed(gaps) for name, gaps in method.gaps.items()},
        "hypervolume": [_hypervolume(method, base, alpha) for alpha in method.grid.alpha.unique()],
        "points": _points(method, base, reference),
        "cost": _cost([run.cost for run in method.runs]),
    }


def _metrics(method: _Judged, base: _Judged, reference: _Reference) -> dict[str, Estimate]:
    """The numbers that are one for a whole front."""
    reports, k = method.reports, len(method.names)
    values = method.values
    found = {
        "value_gain": Estimate.of((values - reference.values).mean(-1), method.num_prompts),
        "worst_value": Estimate.of(values[:, values[0].argmin()], method.num_prompts),
    }
    if method is not base:
        difference = (values - base.values).mean(-1)
        found["value_difference"] = Estimate.of(difference, method.num_prompts)
    if "steering_gain" in reports[0].resampled:
        found |= {
            name: method.estimate([r.resampled[name] for r in reports])
            for name in ("steering_gain", "consistency", "envy")
        }
        # Ratios whose denominator may be 0 say nothing.
        if not found["steering_gain"].excludes_zero():
            del found["consistency"]
        if not (found["value_gain"].low or 0) > 0:
            del found["envy"]
    for name, column in (("kl", 2 * k), ("length", 2 * k + 1)):
        found[name] = method.estimate([r.means[:, 1:, column].mean(-1) for r in reports])
    for name, gaps in method.gaps.items():
        found[name] = method.over_seeds(gaps.nanmean(-1))
        found[f"{name}_worst"] = Estimate(_worst(gaps))
    return found


def _hypervolume(method: _Judged, base: _Judged, alpha: Tensor) -> dict[str, Any]:
    volumes = method.volumes(alpha)
    described = {
        "alpha": round(alpha.item(), 6),
        **asdict(Estimate.of(volumes, method.num_prompts)),
        "difference": None,
        "p": None,
    }
    if method is not base:
        difference = Estimate.of(volumes - base.volumes(alpha), method.num_prompts)
        described["difference"] = asdict(difference)
        described["p"] = permutation_test(
            method.cells(alpha), base.cells(alpha), method.reference_point
        )
    return described


def _points(method: _Judged, base: _Judged, reference: _Reference) -> list[dict[str, Any]]:
    """What a method reaches at every point of the grid."""
    reports, names = method.reports, method.names
    k, gaps = len(names), method.gaps
    means = method.mean([report.means for report in reports])  # (R + 1, G + 1, 2K + 3)
    values, differences = method.values, method.values - base.values

    def estimate(column: Tensor) -> dict[str, float | None]:
        return asdict(Estimate.of(column, method.num_prompts))

    return [
        {
            **asked,
            "value": estimate(values[:, g]),
            "value_reference": _number(reference.values[0, g]),
            "value_gain": estimate(values[:, g] - reference.values[:, g]),
            "value_difference": None if method is base else estimate(differences[:, g]),
            "rewards": {name: estimate(means[:, g + 1, i]) for i, name in enumerate(names)},
            "kl": estimate(means[:, g + 1, 2 * k]),
            "length": estimate(means[:, g + 1, 2 * k + 1]),
            **{name: asdict(method.over_seeds(gap[:, g])) for name, gap in gaps.items()},
        }
        for g, asked in enumerate(method.grid.to_dicts(names))
    ]


def _by_seed(gaps: Tensor) -> list[dict[str, float | None]]:
    """Mean and worst closed gap of every run."""
    return [{"mean": _number(row.nanmean()), "worst": _worst(row)} for row in gaps]


def _worst(gaps: Tensor) -> float | None:
    known = gaps[~gaps.isnan()]
    return known.min().item() if len(known) else None


def _cost(costs: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean over seeds."""
    names = dict.fromkeys(name for cost in costs for name in cost)
    return {name: _mean([cost.get(name) for cost in costs]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
