"""Checkpoints of weights that are split over devices (FSDP2), as those of whole ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = ["Gathered", "gather_checkpoints", "on_one_device", "whole_state"]

M = TypeVar("M", bound=LightningModule)


class Gathered(ModelParallelStrategy):
    """Lightning's strategy, with the checkpoints of all others: one file for any number of devices.

    What is trained is gathered on rank 0, tensor by tensor, and goes through the Trainer's
    ``CheckpointIO``; of a file every device takes its shards. Lightning's own whole checkpoint
    gathers the frozen base too, and numbers the optimizer's state by the parameters of the model.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module keeps, whole; empty but on rank 0."""
        return whole_state(self.lightning_module, self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimizer's own, whole; empty but on rank 0."""
        inner: Any = optimizer
        if isinstance(optimizer, LightningOptimizer):
            inner = optimizer.optimizer
        found: dict[str, Any] = inner.state_dict()
        state = {
            number: {name: _whole(value, self.is_global_zero) for name, value in entries.items()}
            for number, entries in found["state"].items()
        }
        return {**found, "state": state} if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        _check_one_file(self)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(checkpoint_path).is_dir():
            raise ValueError(
                f"The checkpoint {checkpoint_path} is a folder of shards. Give a checkpoint that "
                "was written with ModelParallelStrategy's save_distributed_checkpoint: false."
            )
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: Any = self.lightning_module
        own = module.state_dict()
        stored = checkpoint["state_dict"]
        state = {name: _shard(value, own.get(name)) for name, value in stored.items()}
        ParallelStrategy.load_model_state_dict(self, {"state_dict": state}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        stored = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        states = [_shards(state, optimizer) for optimizer, state in stored]
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def whole_state(module: Any, wanted: bool) -> dict[str, Any]:
    """What checkpoints hold of ``module``'s state, whole; by all ranks, empty where not ``wanted``.

    Args:
        module: A PolicyModule.
        wanted: Whether this rank wants it.
    """
    kept = set(module.kept_state())
    found = {name: _whole(v, wanted) for name, v in module.state_dict().items() if name in kept}
    return found if wanted else {}


def _whole(value: Any, wanted: bool) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()  # by all ranks
    return whole.cpu() if wanted else None


def on_one_device(module: M) -> M | None:
    """``module``, or, where its weights are sharded, a whole copy of it on rank 0; by all ranks.

    Args:
        module: A PolicyModule.

    Returns:
        None where it is sharded, but on rank 0.
    """
    of: Any = module
    if not of.policy.is_sharded:
        return module
    state = whole_state(of, of.global_rank == 0)
    if of.global_rank:
        return None
    copy = type(of)(**of.init_args)
    copy.configure_model()
    copy.load_state_dict(state, strict=False)  # the rest is the base's
    return copy


def _shards(stored: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's stored state with the shards of whatever is shaped as its parameter."""
    numbers = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=False))  # the optimizer compares the groups
    state = {
        number: {name: _shard(value, of_number.get(number)) for name, value in entries.items()}
        for number, entries in stored["state"].items()
    }
    return {**stored, "state": state}


def _shard(value: Any, like: Tensor | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.clone()  # for it may lie in the file, which will be replaced
    # Every device has the whole tensor, so nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gather_checkpoints(trainer: Trainer, stage: str) -> None:
    """Makes the Trainer's strategy ``Gathered`` where it is Lightning's for sharded weights.

    Args:
        trainer: The Trainer.
        stage: As Lightning names it; only ``fit`` writes checkpoints.

    Raises:
        ValueError: checkpoints would be folders of shards.
    """
    strategy = trainer.strategy
    if type(strategy) is not ModelParallelStrategy:
        return
    if stage == "fit" and trainer.checkpoint_callbacks:
        _check_one_file(strategy)
    # In place: whoever refers to the strategy, and a config that names Lightning's class, goes on
    # to do so.
    strategy.__class__ = Gathered


def _check_one_file(strategy: ModelParallelStrategy) -> None:
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "ModelParallelStrategy's save_distributed_checkpoint is true: every checkpoint would "
            "be a folder of shards, which is neither replaced at once nor read by a run with "
            "another strategy. Set save_distributed_checkpoint: false; what is trained is then "
            "gathered into one file."
        )
