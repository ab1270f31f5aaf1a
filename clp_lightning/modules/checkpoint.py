"""Checkpoints that survive a crash; what is said of one that is damaged, or of other rewards."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from ..checkpoints import LAST, PREVIOUS, damaged, only_data, readable
from .gathered import gather_checkpoints

__all__ = [
    "DurableCheckpointIO",
    "WholeCheckpoints",
    "check_optimizer",
    "make_durable",
    "warn_of_other_rewards",
]


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint all or not at all, and keeps the one before last.ckpt.

    A file is written beside its target, synced and renamed, so that neither a kill nor a power cut
    leaves half of one. A last.ckpt that is damaged all the same (by the disk, a copy) is not
    loaded: its predecessor is, with a warning. Paths that are not local are left to Lightning.

    Args:
        mapped: Load what is asked of a tensor and no more, for devices that take a part of each.
    """

    def __init__(self, mapped: bool = False) -> None:
        self.mapped = mapped
        # What belongs to this run: files of an earlier one in the same folder are no predecessors.
        self._own: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path).resolve()
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.name == LAST:
                self._keep(target)
            os.replace(partial, target)
            _sync(target.parent)
        except (OSError, RuntimeError) as error:  # torch's writer hides what the disk said
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(
                f"The checkpoint {target} could not be written: {error}. The one before it is "
                "untouched. Make room, or give RunCheckpoint another dirpath, and go on with "
                "--ckpt_path last."
            ) from error
        self._own.add(target)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Lightning would unpickle what is remote.
        options = {"map_location": map_location, "weights_only": weights_only is not False}
        if not _is_local_file_protocol(path):
            with only_data(path):
                return super().load_checkpoint(path, **options)
        found = readable(path, thorough=True)
        if found != Path(path):
            rank_zero_warn(damaged(path, found))
        self._own.add(found.resolve())
        with only_data(found):
            if self.mapped:
                return torch.load(found, mmap=True, **options)
            return super().load_checkpoint(found, **options)

    def _keep(self, last: Path) -> None:
        """Makes ``last``, which is about to be replaced, the previous one."""
        previous = last.with_name(PREVIOUS)
        if last in self._own:
            second = last.with_name(f".{PREVIOUS}.partial")
            second.unlink(missing_ok=True)
            try:
                os.link(last, second)  # there is a last.ckpt at every moment
            except OSError:  # a file system without links
                shutil.copyfile(last, second)
            os.replace(second, previous)
            self._own.add(previous)
        elif previous not in self._own:
            previous.unlink(missing_ok=True)


def make_durable(trainer: Trainer) -> None:
    """Has ``trainer`` read and write checkpoints by ``DurableCheckpointIO``, not by Lightning's."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's
        mapped = isinstance(trainer.strategy, ModelParallelStrategy)
        trainer.strategy.checkpoint_io = DurableCheckpointIO(mapped)


def _sync(folder: Path) -> None:
    """Makes a rename within ``folder`` last."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WholeCheckpoints(Callback):
    """Checkpoints are whole ones, whatever the strategy; one that is damaged is named in the error.

    Raises:
        ValueError: in ``setup``, if the strategy would write folders of shards; before a run goes
            on, if it has another optimizer.
    """

    _stored_optimizers: list[dict[str, Any]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        gather_checkpoints(trainer, stage)
        make_durable(trainer)
        self._stored_optimizers = []

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._stored_optimizers = checkpoint.get("optimizer_states", [])
        self._check_optimizers(trainer)  # where the strategy has set them up by now

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_optimizers(trainer)
        self._stored_optimizers = []  # several times the size of the weights

    def _check_optimizers(self, trainer: Trainer) -> None:
        for own, stored in zip(trainer.optimizers, self._stored_optimizers, strict=False):
            check_optimizer(own, stored)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            if trainer.ckpt_path:
                readable(trainer.ckpt_path)
        except ValueError as error:
            exception.add_note(str(error))


def check_optimizer(own: Optimizer, stored: dict[str, Any]) -> None:
    """Refuses the state of an optimizer of another kind, which torch loads and stumbles over.

    Args:
        own: Has its parameters.
        stored: ``state_dict()`` of the one that the checkpoint was trained with.

    Raises:
        ValueError: each has settings that the other does not know.
    """
    names, others = (
        {name for group in groups for name in group} - {"initial_lr", "name", "params"}
        for groups in (own.param_groups, stored.get("param_groups", []))
    )
    lost, new = sorted(others - names), sorted(names - others)
    if lost and new:
        raise ValueError(
            f"`optimizer` is {type(own).__name__}, but that of the checkpoint has "
            f"{', '.join(lost)} and not {', '.join(new)}. Go on with the optimizer that it was "
            "trained with."
        )


def warn_of_other_rewards(stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Warns of rewards whose settings differ, where both are known: a lambda has none."""
    for name, settings in own.items():
        before = stored.get(name)
        if before is not None and settings is not None and before != settings:
            rank_zero_warn(
                f"Reward '{name}' is another one than the checkpoint was trained with: it was "
                f"{before}, now it is {settings}. Its statistics are still those of the checkpoint."
            )
