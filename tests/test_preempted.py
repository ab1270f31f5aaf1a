"""SIGTERM to torchrun, in the middle of a long step: the run saves and leaves, and goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from tests.processes import on_two_processes
from tests.runs import run_config, write_config
from tests.test_crash import assert_same_end, read

ROOT = Path(__file__).parents[1]
NAP = 6.0  # seconds


class Nap(Callback):
    """In the first batch of a step, sleeps; before that it makes a file that says so.

    Args:
        step: Optimizer steps that are done by then.
        file: Its name; each rank adds its number.
    """

    def __init__(self, step: int, file: str) -> None:
        self.step, self.file = step, file

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        marker = Path(f"{self.file}-{trainer.global_rank}")
        if trainer.global_step == self.step and not marker.exists():
            marker.touch()
            time.sleep(NAP)


def config_of(folder: Path, base: Path) -> str:
    config = run_config(folder, base, max_steps=4, limit_val_batches=0, accumulate_grad_batches=1)
    config["trainer"]["callbacks"][2]["init_args"]["every_n_train_steps"] = 100
    return write_config(folder / "config.yaml", config)


def start(args: list[str], log: Path) -> subprocess.Popen[bytes]:
    """``configs/cluster/torchrun.sh`` with two processes on one node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        "GPUS": "2",
        "PORT": port,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1",  # which the script overrules
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "configs/cluster/torchrun.sh"), *args]
    with log.open("a") as stream:
        more = ["--trainer.devices=2", "--trainer.strategy=ddp"]
        return subprocess.Popen(
            [*command, *more], stdout=stream, stderr=stream, env=os.environ | environment
        )


def ends(job: subprocess.Popen[bytes], timeout: float) -> int:
    """Its exit status."""
    try:
        return job.wait(timeout)
    finally:
        job.kill()


@pytest.mark.slow
def test_sigterm_to_torchrun(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base, folder, log = tiny_folder(), tmp_path / "told", tmp_path / "log"
    on_two_processes(["fit", "--config", config_of(tmp_path / "whole", base)])

    args = ["fit", "--config", config_of(folder, base), "--ckpt_path=last"]
    nap = ["--trainer.callbacks+=tests.test_preempted.Nap", "--trainer.callbacks.step=1"]
    job = start([*args, *nap, f"--trainer.callbacks.file={folder}/asleep"], log)
    end = time.monotonic() + 600
    while not all((folder / f"asleep-{rank}").exists() for rank in range(2)):
        assert job.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)
    job.terminate()
    assert ends(job, 300) == 1  # of torchrun, whatever its processes end with
    text = log.read_text()
    assert text.count("SIGTERM: step 2 is saved") == 1, text[-3000:]
    assert read(folder / "run")["global_step"] == 2

    assert ends(start(args, log), 600) == 0, log.read_text()[-3000:]
    assert_same_end(folder / "run", read(tmp_path / "whole/run"))
