"""Figures and tables to whatever logger the Trainer has.

Scalars go through ``self.log``; Lightning has no such common call for figures and tables, so each
logger is asked for what it offers. One that offers nothing (CSV, unknown ones) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger

from ..tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figure", "log_table"]


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
