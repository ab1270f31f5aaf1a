"""A callback that kills its process at a named moment, in the middle of what it is doing."""

from __future__ import annotations

import io
import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from clp_lightning.modules import checkpoint as own
from clp_lightning.modules.statistics import EVALUATION_EPOCH, STATISTICS_EPOCH

PHASES = ["statistics", "rollout", "backward", "optimizer", "checkpoint", "validation"]
MOMENTS = ["half", "fsync", "link", "replace", "renamed"]
"""Of a checkpoint: half written, not yet synced, kept, renamed; renamed but not yet for good."""
_SAMPLES = {STATISTICS_EPOCH: "statistics", EVALUATION_EPOCH: "validation"}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(Callback):
    """Kills its process in a phase.

    Args:
        phase: One of ``PHASES``.
        entry: At which time that it comes there, from 1 on.
        moment: Of a checkpoint, one of ``MOMENTS``.
    """

    def __init__(self, phase: str, entry: int, moment: str = "half") -> None:
        assert phase in PHASES and moment in MOMENTS
        self.phase, self.entry, self.moment = phase, entry, moment
        self.entries = 0

    def _due(self, phase: str) -> bool:
        self.entries += phase == self.phase
        return phase == self.phase and self.entries == self.entry

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "engine"):  # nothing is sampled
            return
        engine: Any = pl_module.engine
        generate = engine.generate

        def killing(policy: Any, batch: Any, *args: Any) -> Any:
            if self._due(_SAMPLES.get(batch.epoch, "rollout")):
                passes = iter([None, die])  # in the second, or at the end if there is no second
                hook = policy.model.register_forward_pre_hook
                hook(lambda *_: (next(passes, None) or (lambda: None))())
                generate(policy, batch, *args)
                die()
            return generate(policy, batch, *args)

        engine.generate = killing

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plugin: Any = trainer.strategy.checkpoint_io
        save = plugin.save_checkpoint

        def killing(*args: Any, **options: Any) -> None:
            if self._due("checkpoint"):
                match self.moment:
                    case "half":
                        torch.save = _half_written
                    case "renamed":
                        own._sync = die
                    case name:
                        setattr(os, name, die)
            save(*args, **options)

        plugin.save_checkpoint = killing

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        if self._due("backward"):
            middle = list(pl_module.policy.trained_parameters().values())
            middle[len(middle) // 2].register_hook(die)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if self._due("optimizer"):
            # Before the weights move, or after it and before anybody knows.
            odd = self.entry % 2
            register = (
                optimizer.register_step_pre_hook if odd else optimizer.register_step_post_hook
            )
            register(die)


_save = torch.save


def _half_written(checkpoint: Any, file: Any) -> None:
    whole = io.BytesIO()
    _save(checkpoint, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    die()
