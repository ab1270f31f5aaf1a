"""Processes that are killed or paired."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
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


def in_child(function: Callable[..., Any], *args: Any, timeout: float = 120) -> int:
    """Exit status of ``function(*args)`` in a forked process: minus the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError(f"the child ran for more than {timeout} s")
    return child.exitcode


def on_two_processes(args: list[str], timeout: float = 120) -> None:
    """The command line on two CPU processes, as ``torchrun`` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_rank, args=(rank, port, args + more)) for rank in range(2)]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(timeout)
        assert [child.exitcode for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()


def _rank(rank: int, port: int, args: list[str]) -> None:
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
    main(args)
