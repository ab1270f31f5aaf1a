"""From the arguments of the command to methods that can be compared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..metrics import FrontSamples
from ..metrics.samples import REFERENCE
from ..types import Preference
from .alike import (
    Statistics,
    check_alike,
    in_units,
    named,
    on_grid,
    reference_warnings,
    statistics,
)
from .runs import Method, Run, front_file, read_run

__all__ = ["Compared", "group", "read_methods"]

_SUMMED = (
    "optimizer_steps",
    "sampled_tokens",
    "responses",
    "reward_calls",
    "wall_s",
    "trained_parameters",
    "models",
)


@dataclass
class Compared:
    """Methods on one grid and the same prompts, in one unit.

    Attributes:
        methods: In the order of their first run.
        units: Mean and deviation of every reward, those of the first run.
        renormalized: Runs that had others, and which.
        warnings: What a reader should know.
    """

    methods: list[Method]
    units: Statistics
    renormalized: dict[str, dict[str, tuple[float, float]]]
    warnings: list[str]


def read_methods(specs: Sequence[str | Path]) -> Compared:
    """The methods that ``specs`` name; see ``compare``.

    Raises:
        FileNotFoundError: says what is missing.
        ValueError: says what differs, where fronts cannot be compared.
    """
    grouped = group(specs)
    first = read_run(next(iter(grouped.values()))[0][0])
    compared = Compared([], statistics(first.samples), {}, [])
    wanted: Run | None = None  # the first run with all its points
    for label, seeds in grouped.items():
        method = Method(label, [])
        for paths in seeds:
            run = _united([_in_units_of(first, path, compared) for path in paths])
            wanted = wanted or run
            check_alike(wanted, run)
            compared.warnings += reference_warnings(wanted, run)
            method.runs.append(on_grid(run, wanted))
        _check_seeds(method)
        compared.methods.append(method)
    return compared


def group(specs: Sequence[str | Path]) -> dict[str, list[list[Path]]]:
    """Which paths belong to one run, and which runs to one method.

    Raises:
        FileNotFoundError: there is no front at a path.
        ValueError: an argument that cannot be understood, or a front given twice.

    Returns:
        For every label its seeds, each a list of paths.
    """
    methods: dict[str, list[list[Path]]] = {}
    seen: set[Path] = set()
    for spec in map(str, specs):
        label, paths = _parse(spec)
        files = [front_file(path).resolve() for path in paths]
        if not label and len(paths) > 1:
            raise ValueError(f"Several runs make one method here, so name it: LABEL={spec}")
        for path, file in zip(paths, files, strict=True):
            if file in seen:
                raise ValueError(f"{path} is given twice.")
            seen.add(file)
        label = label or re.sub(r"-\d+$", "", files[0].parent.name)
        methods.setdefault(label, []).append(paths)
    if not methods:
        raise ValueError("There is nothing to compare: give runs, as [LABEL=]PATH[+PATH...].")
    return methods


def _parse(spec: str) -> tuple[str, list[Path]]:
    """Label ("" for none) and paths; what exists as it stands is one path."""
    label, rest = "", spec
    if not Path(spec).exists() and "=" in spec:
        label, _, rest = spec.partition("=")
        if not label:
            raise ValueError(f"'{spec}' has an empty label; write LABEL=PATH.")
    parts = [rest] if Path(rest).exists() else rest.split("+")
    if not all(parts):
        raise ValueError(f"'{spec}' names an empty path; write LABEL=PATH or LABEL=PATH+PATH.")
    return label, [Path(part) for part in parts]


def _in_units_of(first: Run, path: Path, compared: Compared) -> Run:
    """Reads a run, into the rewards' order and units of the first."""
    run = read_run(path)
    check_alike(first, run, grid=False)
    run, others = in_units(run, first, compared.units)
    if others:
        compared.renormalized[run.name] = others
    return run


def _united(runs: Sequence[Run]) -> Run:
    """One front with the points of all ``runs``; the reference is the first one's."""
    first = runs[0]
    points = [named(point, run.names) for run in runs for point in run.points]
    for point, times in Counter(points).items():
        if times > 1:
            raise ValueError(
                f"{' + '.join(run.name for run in runs)} has the point {point} {times} times; runs "
                "that are put together have different points."
            )
    if len(runs) == 1:
        return first
    parts, start = [first.samples.at(REFERENCE)], 0
    for run in runs:
        trained = run.samples.select(run.samples.point != REFERENCE)
        parts.append(replace(trained, point=trained.point + start))
        start += len(run.grid)
    common = [name for name in first.gaps if all(name in run.gaps for run in runs)]
    return replace(
        first,
        name=" + ".join(run.name for run in runs),
        grid=Preference.cat([run.grid for run in runs]),
        samples=FrontSamples.cat(parts),
        gaps={name: torch.cat([run.gaps[name] for run in runs]) for name in common},
        cost=_summed([run.cost for run in runs]),
    )


def _summed(costs: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The cost of all runs together; what one of them does not know is unknown."""
    total: dict[str, float | None] = {}
    for name in (*_SUMMED, "forwards"):
        known = [value for cost in costs if (value := cost.get(name)) is not None]
        # One of the runs answers, so its forwards are those of an answer.
        combined = max(known, default=None) if name == "forwards" else sum(known)
        total[name] = combined if len(known) == len(costs) else None
    return total


def _check_seeds(method: Method) -> None:
    for seed, times in Counter(run.seed for run in method.runs).items():
        if times > 1:
            same = " and ".join(run.name for run in method.runs if run.seed == seed)
            raise ValueError(
                f"'{method.label}' has {times} runs of seed {seed}: {same}. Seeds of one method "
                "differ; if these are several methods, give each a label: LABEL=PATH."
            )
