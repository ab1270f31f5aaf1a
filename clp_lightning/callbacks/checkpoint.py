"""RunCheckpoint: checkpoints whose last.ckpt is the newest state of the run."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..checkpoints import LAST, PREVIOUS, damaged
from ..modules.checkpoint import make_durable
from .loggers import go_on, put_back

__all__ = ["RunCheckpoint", "save_first"]

_PROCESSES = "clp_lightning_processes"
_VALIDATION_DUE = "clp_lightning_validation_due"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with ``last.ckpt`` kept as this library's commands expect it.

    ``checkpoints/last.ckpt`` is written with every save and once more at the end of training, and a
    new run in the same folder replaces it. It is synced before it gets its name, and the one before
    stays as ``previous.ckpt``, which is loaded (with a warning) should the last be damaged or gone.

    On SIGTERM the run finishes its optimizer step, saves and leaves with status 143; during a front
    it leaves at once, to the checkpoint that there is. ``fit --ckpt_path last`` goes on. What was
    logged after the checkpoint is logged again: TensorBoard and CSV forget the first.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        monitor: Metric to keep the best of, for example ``val/value``; none if None.
        mode: Whether the metric is to be large or small.
        save_top_k: How many of the best (without ``monitor``: newest) to keep beside the last.
        dirpath: Folder of the checkpoints; ``checkpoints`` in the run's log folder if None.
    """

    _told = False  # of SIGTERM
    _leaving = False
    _steps_done = 0  # by the run that is resumed
    _validation_due = False  # right after the step that is saved

    def __init__(
        self,
        every_n_train_steps: int = 100,
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 0,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath,
            every_n_train_steps=every_n_train_steps,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._told = self._leaving = False
        self._steps_done, self._validation_due = 0, False
        make_durable(trainer)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What Lightning takes for ``ckpt_path="last"``; without a last one the one before."""
        if found := super()._find_last_checkpoints(trainer):
            return found
        self.CHECKPOINT_NAME_LAST = Path(PREVIOUS).stem
        try:
            found = super()._find_last_checkpoints(trainer)
        finally:
            del self.CHECKPOINT_NAME_LAST  # the class has another
        for path in found:
            rank_zero_warn(damaged(Path(path).with_name(LAST), path))
        return found

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_PROCESSES] = trainer.world_size
        checkpoint[_VALIDATION_DUE] = self._validation_due

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._steps_done = checkpoint["global_step"]
        self._validation_due = checkpoint.get(_VALIDATION_DUE, False)
        before, now = checkpoint.get(_PROCESSES, trainer.world_size), trainer.world_size
        if before != now:
            # Lightning's own count within the pass is of one process, as the sampler's is.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for count in (progress["current"], progress["total"]):
                open_batches = count["ready"] - count["completed"]
                ready = -(-count["ready"] * before // now)
                count |= dict.fromkeys(("ready", "started", "processed"), ready)
                count["completed"] = ready - open_batches
        if trainer.strategy.restore_checkpoint_after_setup:  # which is after on_fit_start
            self._go_on_logging(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._go_on_logging(trainer)

    def _go_on_logging(self, trainer: Trainer) -> None:
        # A validation is logged with the number of the step before it, and will be again.
        go_on(trainer.loggers, self._steps_done - self._validation_due)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        put_back(trainer.loggers)
        super().on_exception(trainer, pl_module, exception)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.strategy.restore_checkpoint_after_setup and not self._steps_done:
            self._go_on_logging(trainer)  # a new run
        # A resumed ModelCheckpoint does not know that this step is saved, and would save it again
        # after the first batch of the next one, whose gradient a second resume would then lack.
        self._last_global_step_saved = trainer.global_step
        # Lightning's own handler broadcasts, in the middle of whatever the ranks are at, and ends
        # the run in the middle of a step. It is put back by Lightning, which restores all.
        self._told = trainer.received_sigterm
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)
        self._leaving = self._any_told(trainer)  # while the statistics were measured
        self._leave()
        if self._validation_due:
            # Lightning takes a validation that follows a checkpoint for done.
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting, trainer.validating = False, True
            loop.run()
            trainer.training = True

    def _hear(self, *_: Any) -> None:
        self._told = True

    def _any_told(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._told, all=False)

    def _leave(self) -> None:
        if self._leaving:
            raise SIGTERMException(128 + signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop: Any = trainer.fit_loop
        self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.fit_loop._should_accumulate() or not self._any_told(trainer):
            return
        self._save_newest(trainer)
        rank_zero_info(
            f"SIGTERM: step {trainer.global_step} is saved in {self.last_model_path}; "
            "--ckpt_path last goes on from there."
        )
        # Lightning still writes the numbers of this step; the run ends with whatever comes next.
        self._leaving = True

    def on_train_batch_start(self, *_: Any) -> None:
        self._leave()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_due &= trainer.sanity_checking
        super().on_validation_end(trainer, pl_module)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._leaving = self._told  # nothing is to be saved, so nobody is asked
        self._leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._save_newest(trainer)

    def _save_newest(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = trainer.global_step


def save_first(trainer: Trainer, pl_module: LightningModule) -> None:
    """Saves the end of training now: whatever follows may fail, and training must not be lost.

    Lightning calls checkpoint callbacks last.
    """
    for callback in trainer.checkpoint_callbacks:
        callback.on_train_end(trainer, pl_module)
