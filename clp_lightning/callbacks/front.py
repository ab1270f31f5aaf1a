"""Writes and draws the front that the module measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from ..functional import dial_criteria
from ..tables import point_cells, point_label, print_table
from .checkpoint import save_first
from .loggers import log_figure
from .plots import plot_front

__all__ = ["FrontCallback"]

_MAX_ROWS = 30


class FrontCallback(Callback):
    """Writes front.json, front_samples.parquet, front.csv and front.png into the run's log folder.

    Does so after every validation and test, draws the front in the loggers, and ends ``fit``,
    ``validate`` and ``test`` with a table and the line ``front: <path of front.json>``. Validations
    within ``fit`` may be small; at its end this callback has the module measure the full grid once,
    by setting ``pl_module.full_grid``.

    The module measures: at the end of a validation or test epoch it sets ``front_report``, and it
    has a ``seed``, its ``trained_steps``, a dict ``decoding`` and methods ``cost_report`` and
    ``base_identity``.

    Attributes:
        path: Of the newest front.json of this run, on rank zero; None before there is one.
        swept: Whether this object's ``fit`` has measured the full grid.
    """

    path: Path | None = None
    swept: bool = False
    _front: dict[str, Any]
    _in_fit: bool = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the front of an earlier run."""
        self.path, self._in_fit = None, stage == "fit"

    def extra_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """More entries for "metrics", such as a closed gap; to override. Runs on every process."""
        return {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records the front, except in Lightning's sanity check."""
        if not trainer.sanity_checking:
            self._record(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records the front."""
        self._record(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the full grid, if the run has validation data.

        Here, because by ``on_fit_end`` the strategy has moved the model to the CPU.
        """
        self.swept = True
        save_first(trainer, pl_module)
        if trainer.enable_validation:
            with _validating(trainer), _full_grid(pl_module):
                trainer.validate_loop.run()
                trainer.validate_loop.teardown()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prints the table and the path, once per run."""
        if self.path is None:
            return
        if trainer.progress_bar_callback is not None:
            # A bar that is still live would draw itself once more, below the line.
            trainer.progress_bar_callback.teardown(trainer, pl_module, stage=stage)
        _print_table(self._front)
        print(f"front: {self.path}", flush=True)

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        report: Any = getattr(pl_module, "front_report", None)
        if report is None:
            raise RuntimeError(
                f"FrontCallback found no front: {type(pl_module).__name__} must set `front_report` "
                "at the end of its validation and test epochs, as CLPModule does."
            )
        module: Any = pl_module
        extra = self.extra_metrics(trainer, pl_module)
        # These communicate, so on every rank.
        folder, base = Path(trainer.log_dir or trainer.default_root_dir), module.base_identity()
        if not trainer.is_global_zero:
            return
        body = report.to_dict()
        front = {
            "schema": body.pop("schema"),
            **self._measured(trainer, module),
            "seed": module.seed,
            "decoding": module.decoding,
            **body,
        }
        front["metrics"] |= extra
        front |= {"cost": module.cost_report(), "base": base}
        self._front, self.path = front, folder / "front.json"

        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(front, indent=1, allow_nan=False)
        columns = {name: c.numpy() for name, c in report.samples.columns(report.names).items()}
        samples, points = pd.DataFrame(columns), pd.DataFrame(_flat_rows(front))
        _write(self.path, lambda path: path.write_text(text))
        _write(folder / "front_samples.parquet", lambda path: samples.to_parquet(path, index=False))
        _write(folder / "front.csv", lambda path: points.to_csv(path, index=False))
        try:
            figure = plot_front(front)
        except ModuleNotFoundError as error:
            rank_zero_info(f"No front.png: {error}")
            return
        _write(folder / "front.png", lambda path: figure.savefig(path, format="png", dpi=120))
        log_figure(trainer.loggers, "front", figure, trainer.global_step)

    def _measured(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        """Which policy, and in which command: validate's front has the same name as test's."""
        # In fit it is the path that the run was resumed from; the policy has moved since.
        path = None if self._in_fit else trainer.ckpt_path
        return {
            "stage": "test" if trainer.testing else "validate",
            "checkpoint": None if path is None else str(path),
            "global_step": pl_module.trained_steps,
        }


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """As inside ``trainer.validate``: its loop, not that of ``fit``.

    So the progress of ``fit`` stays as it is, and ModelCheckpoint and EarlyStopping, which compare
    the small grids of a run with each other, do not see the full one.
    """
    state, loop = trainer.state, trainer.validate_loop
    before = state.fn, state.stage, loop.verbose
    state.fn, loop.verbose = TrainerFn.VALIDATING, False
    trainer.validating = True
    try:
        yield
    finally:
        state.fn, state.stage, loop.verbose = before


@contextmanager
def _full_grid(pl_module: Any) -> Iterator[None]:
    before = getattr(pl_module, "full_grid", False)
    pl_module.full_grid = True
    try:
        yield
    finally:
        pl_module.full_grid = before


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """All or nothing: a reader never finds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flat_rows(front: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of front.csv: the reference, then the points."""
    rows = []
    for number, point in enumerate([front["reference"], *front["points"]], start=-1):
        row = {"point": number}
        for name in front["rewards"]:
            row[f"weight/{name}"] = point.get("weights", {}).get(name)
        row["alpha"] = point.get("alpha")
        for kind, prefix in (("rewards", "reward"), ("normalized", "normalized")):
            row |= {f"{prefix}/{name}": value for name, value in point[kind].items()}
        for name in ("kl", "length", "truncated", "value", "value_reference", "n"):
            row[name] = point.get(name)
        rows.append(row)
    return rows


def _print_table(front: dict[str, Any]) -> None:
    """Reference and points, and which criteria of a working dial are met."""
    names, points = front["rewards"], front["points"]
    table = Table(title=f"Front, {front['reference']['n']} prompts")
    for heading in (" / ".join(names), "alpha", *names, "KL", "length", "V"):
        table.add_column(heading, justify="right")

    def add(label: str, alpha: str, point: dict[str, Any], value: float | None) -> None:
        table.add_row(label, alpha, *point_cells(point, names, value))

    known = [point["value_reference"] for point in points if point["value_reference"] is not None]
    add("reference", "", front["reference"], sum(known) / len(known) if known else None)
    for point in points[:_MAX_ROWS]:
        add(point_label(point, names), f"{point['alpha']:g}", point, point["value"])
    if len(points) > _MAX_ROWS:
        table.caption = f"{len(points) - _MAX_ROWS} more in front.csv"
    print_table(table)
    if front["metrics"]["steering_gain"]["mean"] is None:
        print("dial: none (one preference, or too few prompts)")
        return
    criteria = dial_criteria(front["metrics"])
    failed = ", ".join(name.replace("_", " ") for name, met in criteria.items() if not met)
    print(f"dial: fails on {failed}" if failed else "dial: passes")
