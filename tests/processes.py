"""Processes that are killed or paired."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from clp_lightning.cli import main


class Kill(Callback):
    """Kills its process, as a machine that fails does.

    Args:
        where: ``train`` (a batch), ``window`` (the second batch of two that make a step),
            ``epoch`` (the end of a pass) or ``validation`` (a batch).
        step: Optimizer steps that are done by then.
    """

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step = where, step

    def _kill(self, where: str, trainer: Trainer) -> None:
        if where == self.where and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._kill("train", trainer)
        if batch_idx % 2:
            self._kill("window", trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._kill("epoch", trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 1:
            self._kill("validation", trainer)


def in_child(
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    kill_after: float = 0,
    by: int = signal.SIGKILL,
) -> int:
    """Exit status of ``function(*args)`` in a forked process: minus the signal that ended it.

    With ``kill_after`` it gets the signal ``by`` after that many seconds, if it has not ended.
    """
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    if kill_after:
        child.join(kill_after)
        if child.exitcode is None and child.pid is not None:
            os.kill(child.pid, by)
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError(f"the child ran for more than {timeout} s")
    return child.exitcode


def on_two_processes(args: list[str], timeout: float = 120) -> None:
    """The command line on two CPU processes, as ``torchrun`` starts it."""
    assert statuses_of_two(main, args, timeout) == [0, 0]


_SHARDED = "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
STRATEGIES = {
    "ddp": ["--trainer.strategy=ddp"],
    "fsdp": [
        _SHARDED,
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.strategy.save_distributed_checkpoint=false",
    ],
}


def statuses_of_two(
    command: Callable[[list[str]], Any],
    args: list[str],
    timeout: float,
    folder: Path | None = None,
    layout: str = "ddp",
) -> list[int | None]:
    """How ``command(args)`` ends on two CPU processes; None if it has not by ``timeout`` seconds.

    What they print goes to ``folder``, one file for each, if there is one. They have copies of the
    weights (``ddp``) or shards (``fsdp``).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = [*args, "--trainer.devices=2", *STRATEGIES[layout]]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_rank, args=(rank, port, command, args, folder)) for rank in range(2)
    ]
    for child in children:
        child.start()
    try:
        end = time.monotonic() + timeout
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()


def _rank(
    rank: int,
    port: int,
    command: Callable[[list[str]], Any],
    args: list[str],
    folder: Path | None,
) -> None:
    if folder is not None:
        sys.stdout = sys.stderr = open(folder / f"output-{rank}", "w", buffering=1)  # noqa: SIM115
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
    }
    command(args)
