"""What is said of a checkpoint that is damaged, or of other rewards."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ..checkpoints import check_readable

__all__ = ["NameDamagedCheckpoint", "warn_of_other_rewards"]


class NameDamagedCheckpoint(Callback):
    """Adds to an error the file that was being loaded, where that is not a whole checkpoint."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            check_readable(trainer.ckpt_path or "")
        except ValueError as error:
            exception.add_note(str(error))


def warn_of_other_rewards(stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Warns of rewards whose settings differ, where both are known: a lambda has none."""
    for name, settings in own.items():
        before = stored.get(name)
        if before is not None and settings is not None and before != settings:
            rank_zero_warn(
                f"Reward '{name}' is another one than the checkpoint was trained with: it was "
                f"{before}, now it is {settings}. Its statistics are still those of the checkpoint."
            )
