from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clp_lightning.callbacks.loggers import log_figure, log_table

COLUMNS, ROWS = ["prompt", "length"], [["a|b\nc", 3], ["d", 4]]


@pytest.fixture
def figure() -> Figure:
    made = Figure()
    made.subplots().plot([0, 1])
    return made


def test_tensorboard(tmp_path: Path, figure: Figure) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_figure([logger], "front", figure, step=3)
    log_table([logger], "samples", COLUMNS, ROWS, step=4)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("front")] == [3]
    (text,) = events.Tensors("samples/text_summary")
    assert text.step == 4
    want = "| prompt | length |\n| --- | --- |\n| a\\|b<br>c | 3 |\n| d | 4 |"
    assert text.tensor_proto.string_val[0].decode() == want


def test_loggers_without_figures_are_left_out(tmp_path: Path, figure: Figure) -> None:
    loggers: list[Any] = [CSVLogger(tmp_path), DummyLogger(), SimpleNamespace()]
    log_figure(loggers, "front", figure, step=0)
    log_table(loggers, "samples", COLUMNS, ROWS, step=0)


class Recorder:
    """Stands for a service that cannot run here; has only the methods that it is given."""

    def __init__(self, *methods: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for method in methods:
            setattr(self, method, self._record(method))

    def _record(self, method: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((method, args, kwargs))


def test_wandb(figure: Figure) -> None:
    logger: Any = Recorder("log_image", "log_table")
    logger.experiment = Recorder("log")
    log_figure([logger], "front", figure, step=3)
    log_table([logger], "samples", COLUMNS, ROWS, step=3)
    assert logger.calls == [
        ("log_image", (), {"key": "front", "images": [figure], "step": 3}),
        ("log_table", (), {"key": "samples", "columns": COLUMNS, "data": ROWS, "step": 3}),
    ]


def test_mlflow(figure: Figure) -> None:
    client = Recorder("log_figure", "log_table")
    logger: Any = SimpleNamespace(experiment=client, run_id="r1")
    log_figure([logger], "front", figure, step=3)
    log_table([logger], "samples", COLUMNS, ROWS, step=3)
    data = {"prompt": ["a|b\nc", "d"], "length": [3, 4]}
    assert client.calls == [
        ("log_figure", ("r1", figure, "front_3.png"), {}),
        ("log_table", ("r1", data, "samples_3.json"), {}),
    ]


def test_comet(figure: Figure) -> None:
    experiment = Recorder("log_figure", "log_table")
    logger: Any = SimpleNamespace(experiment=experiment)
    log_figure([logger], "front", figure, step=3)
    log_table([logger], "samples", COLUMNS, ROWS, step=3)
    assert experiment.calls == [
        ("log_figure", (), {"figure_name": "front", "figure": figure, "step": 3}),
        ("log_table", ("samples_3.csv", ROWS), {"headers": COLUMNS}),
    ]
