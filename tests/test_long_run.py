"""A long run holds no more memory, files, descriptors and threads at its end than at its start."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, Trainer

from clp_lightning.cli import main
from tests.processes import in_child
from tests.runs import read_lines, run_config, write_config

STEPS, EVERY, START = 2000, 100, 200


class Holds(Callback):
    """Writes down, now and then, what the process holds.

    Args:
        path: A file, of one JSON line each time.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step % EVERY:
            return
        gc.collect()  # a figure is garbage in a cycle, which is no leak
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        record = {
            "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "files": sum(len(files) for _, _, files in os.walk(Path(self.path).parent / "run")),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what it holds")
def test_nothing_grows(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = run_config(tmp_path, tiny_folder(), max_steps=STEPS, accumulate_grad_batches=1)
    config["trainer"]["val_check_interval"] = 100  # the first front loads what draws it
    config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "run", "version": ""},
    }
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 50
    config["trainer"]["callbacks"].append(
        {"class_path": "tests.test_long_run.Holds", "init_args": {"path": str(tmp_path / "held")}}
    )
    # With a limit to its time, every reward runs in a thread of its own.
    config["model"]["init_args"] |= {"reward_timeout": 60.0, "on_reward_error": "drop"}
    path = write_config(tmp_path / "config.yaml", config)
    assert in_child(main, ["fit", "--config", path], timeout=1200) == 0
    records = read_lines(tmp_path / "held")
    assert len(records) == STEPS // EVERY
    late = records[START // EVERY - 1 :]
    megabytes = [record["megabytes"] for record in late]
    growth = float(np.polyfit(range(len(megabytes)), megabytes, 1)[0])
    assert growth < 1, megabytes
    for what in ("descriptors", "threads", "files"):
        counts = [record[what] for record in late]
        assert max(counts) == counts[0], counts
