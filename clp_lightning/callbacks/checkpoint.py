"""RunCheckpoint: checkpoints whose last.ckpt is the newest state of the run."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["RunCheckpoint", "save_first"]


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with ``last.ckpt`` kept as this library's commands expect it.

    ``checkpoints/last.ckpt`` is written with every save and once more at the end of training, and a
    new run in the same folder replaces it.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        monitor: Metric to keep the best of, for example ``val/value``; none if None.
        mode: Whether the metric is to be large or small.
        save_top_k: How many of the best (without ``monitor``: newest) to keep beside the last.
        dirpath: Folder of the checkpoints; ``checkpoints`` in the run's log folder if None.
    """

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed ModelCheckpoint does not know that this step is saved, and would save it again
        # after the first batch of the next one, whose gradient a second resume would then lack.
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = trainer.global_step


def save_first(trainer: Trainer, pl_module: LightningModule) -> None:
    """Saves the end of training now: whatever follows may fail, and training must not be lost.

    Lightning calls checkpoint callbacks last.
    """
    for callback in trainer.checkpoint_callbacks:
        callback.on_train_end(trainer, pl_module)
