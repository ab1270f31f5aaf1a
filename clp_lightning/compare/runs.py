"""A front, read back from its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..metrics import FrontSamples
from ..metrics.samples import REFERENCE
from ..steerable.checkpoint import run_folder
from ..types import Preference

__all__ = ["GAPS", "Method", "Point", "Run", "front_file", "read_run"]

GAPS = ("closed_gap", "closed_gap_unseen")
"""Metrics of a front of an exact task, point by point."""

Point = tuple[float, ...]
"""Weights and alpha, rounded: points of two fronts are the same if these are equal."""

_DIGITS = 4  # 0.3333 in a config is the 1/3 of a grid


@dataclass
class Run:
    """One seed of a method: a front, or several whose points are put together.

    Attributes:
        name: Its path, as it was given.
        seed: Of the (first) run.
        names: The K rewards.
        base: Fingerprint of the base's weights; None is unknown.
        grid: G rows.
        decoding: Under which it was measured; engine and seed, which may differ, left out.
        engine: What answered.
        reference_point: Of the hypervolume.
        samples: Its responses; of the reference those of the first run.
        gaps: Those of ``GAPS`` that the task has, of every point, NaN where undefined, (G,) each.
        cost: Numbers by name; None is unknown.
    """

    name: str
    seed: int
    names: list[str]
    base: str | None
    grid: Preference
    decoding: dict[str, Any]
    engine: str | None
    reference_point: list[float]
    samples: FrontSamples
    gaps: dict[str, Tensor]
    cost: dict[str, float | None]

    @property
    def points(self) -> list[Point]:
        """The grid, G of them."""
        rows = torch.cat([self.grid.weights, self.grid.alpha.unsqueeze(-1)], -1)
        return [tuple(round(value, _DIGITS) for value in row) for row in rows.tolist()]


@dataclass
class Method:
    """Runs that differ in their seed only.

    Attributes:
        label: Its name in tables.
        runs: One for each seed.
    """

    label: str
    runs: list[Run]


def front_file(path: str | Path) -> Path:
    """The front.json of a run's folder, a .ckpt, a saved policy's folder, or the file itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a checkpoint was given, and the front beside it measured another.
    """
    given = Path(path)
    folder = run_folder(given) if given.suffix == ".ckpt" and given.is_file() else given
    file = folder if folder.suffix == ".json" else folder / "front.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no front at {file}. Give a run's folder, its .ckpt, or a front.json; "
            "`validate` and `test` write one."
        )
    if given.suffix == ".ckpt":
        # The policy in memory is that of the end of fit, which last.ckpt holds.
        measured = Path(_load(file).get("checkpoint") or "last.ckpt").name
        if measured != given.name:
            raise ValueError(
                f"{file} measured {measured}, not {given.name}: measure that one first, with "
                f"`validate` or `test` and --ckpt_path {given}."
            )
    return file


def read_run(path: str | Path) -> Run:
    """The front of ``path``: see ``front_file``.

    Raises:
        FileNotFoundError: the front, or the responses beside it, are missing.
        ValueError: it is not one of this version.
    """
    file = front_file(path)
    front = _load(file)
    try:
        names = list(front["rewards"])
        weights = [[point["weights"][name] for name in names] for point in front["points"]]
        alphas = [point["alpha"] for point in front["points"]]
        gaps = {name: (front["metrics"].get(name) or {}).get("points") for name in GAPS}
        decoding = dict(front["decoding"])
        run = Run(
            name=str(path),
            seed=front["seed"],
            names=names,
            base=front.get("base", {}).get("fingerprint"),
            grid=Preference(torch.tensor(weights).double(), torch.tensor(alphas).double()),
            decoding={k: v for k, v in decoding.items() if k not in ("engine", "seed")},
            engine=decoding.get("engine"),
            reference_point=front["reference_point"],
            samples=_read_samples(file.with_name("front_samples.parquet"), names),
            gaps={name: _with_nan(points) for name, points in gaps.items() if points},
            cost=front.get("cost", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no front.json of this version ({type(error).__name__}: {error}). "
            "Write it again with `validate` or `test`."
        ) from error
    if run.samples.point.unique().tolist() != list(range(REFERENCE, len(run.grid))):
        raise ValueError(
            f"front_samples.parquet beside {file} has other points than it: write both again with "
            "`validate` or `test`."
        )
    return run


def _load(file: Path) -> dict[str, Any]:
    try:
        front = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(front, dict):
        raise ValueError(f"{file} is no front.json: it holds a {type(front).__name__}.")
    return front


def _with_nan(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float64)


def _read_samples(file: Path, names: Sequence[str]) -> FrontSamples:
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}, the responses behind front.json.")
    table = pd.read_parquet(file)

    def column(name: str) -> Tensor:
        if name not in table:
            raise ValueError(f"{file} has no column '{name}'.")
        return torch.from_numpy(table[name].to_numpy(copy=True))

    return FrontSamples(
        prompt_id=column("prompt_id"),
        point=column("point").long(),
        sample=column("sample").long(),
        rewards=torch.stack([column(f"reward/{name}") for name in names], -1).double(),
        normalized=torch.stack([column(f"normalized/{name}") for name in names], -1).double(),
        log_ratio=column("log_ratio"),
        length=column("length"),
        truncated=column("truncated"),
    )
