"""What loggers have no common call for: figures, tables, going on with an interrupted run.

Scalars go through ``self.log``; for the rest each logger is asked for what it offers. One that
offers nothing is left out.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from ..tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["go_on", "log_figure", "log_table", "put_back", "set_aside"]


def log_figure(loggers: Iterable[Logger], name: str, figure: Figure, step: int) -> None:
    """Shows a figure in every logger that can. Call it on rank zero.

    Args:
        loggers: ``trainer.loggers``.
        name: Under which the logger files it.
        figure: From matplotlib; stays open.
        step: ``trainer.global_step``.
    """
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):  # TensorBoard
            experiment.add_figure(name, figure, global_step=step, close=False)
        elif hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key=name, images=[figure], step=step)
        elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
            experiment.log_figure(logger.run_id, figure, f"{name}_{step}.png")
        elif hasattr(experiment, "log_figure"):  # Comet
            experiment.log_figure(figure_name=name, figure=figure, step=step)


def log_table(
    loggers: Iterable[Logger],
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    step: int,
) -> None:
    """Shows a table in every logger that can. Call it on rank zero.

    Args:
        loggers: ``trainer.loggers``.
        name: Under which the logger files it.
        columns: Headings.
        rows: Texts and numbers, each row as long as ``columns``.
        step: ``trainer.global_step``.
    """
    cells = [list(row) for row in rows]
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_text"):  # TensorBoard
            experiment.add_text(name, markdown_table(columns, cells), global_step=step)
        elif hasattr(experiment, "log_table") and hasattr(logger, "run_id"):  # MLflow
            data = {column: [row[i] for row in cells] for i, column in enumerate(columns)}
            experiment.log_table(logger.run_id, data, f"{name}_{step}.json")
        elif hasattr(experiment, "log_table"):  # Comet
            experiment.log_table(f"{name}_{step}.csv", cells, headers=list(columns))
        elif hasattr(logger, "log_table"):  # Weights & Biases
            logger.log_table(key=name, columns=list(columns), data=cells, step=step)


@rank_zero_only
def set_aside(loggers: Iterable[Logger]) -> None:
    """Keeps the rows of CSV loggers for ``go_on``; Lightning would delete them at the next start.

    Args:
        loggers: ``trainer.loggers``, before the run starts.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            rows, kept = _csv_files(logger)
            # Rows set aside by a start that was killed are the older ones, and all there are.
            if rows.is_file() and not kept.exists():
                os.replace(rows, kept)


@rank_zero_only
def put_back(loggers: Iterable[Logger]) -> None:
    """Undoes ``set_aside`` where the run ends before ``go_on``: its checkpoint was refused, say.

    Args:
        loggers: ``trainer.loggers``.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            rows, kept = _csv_files(logger)
            if kept.exists():
                os.replace(kept, rows)


@rank_zero_only
def go_on(loggers: Iterable[Logger], step: int) -> None:
    """Takes back what was logged after the checkpoint that a run goes on from.

    Args:
        loggers: ``trainer.loggers``.
        step: Optimizer steps that are done. Everything from that step on will be logged again; for
            a new run, which has 0, everything of an earlier one in the same folder.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            if len([*Path(logger.log_dir).glob("events.out.tfevents.*")]) < 2:
                continue  # this run's own, which holds its hyperparameters under step 0
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # As SummaryWriter(purge_step=step) writes it, which cannot be known when it is made.
            start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment._get_file_writer().add_event(start)
        elif isinstance(logger, CSVLogger) and _csv_files(logger)[1].exists():
            kept = _csv_files(logger)[1]
            with kept.open(newline="") as file:
                rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
            done: list[Any] = [row for row in rows if int(row["step"]) < step]
            logger.experiment.metrics[:0] = done
            logger.save()
            kept.unlink()


def _csv_files(logger: CSVLogger) -> tuple[Path, Path]:
    """Where a logger's rows are, and where they are set aside."""
    folder = Path(logger.log_dir)
    return folder / "metrics.csv", folder / ".metrics.before.csv"
