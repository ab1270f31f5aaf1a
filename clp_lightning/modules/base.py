"""What every module of the library shares: hyperparameters, optimizer groups, checkpoints."""

from __future__ import annotations

import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self, get_args

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoints import check_readable, only_data, readable
from ..conditioning import Conditioner
from ..described import Described, check_choice, describe, import_path
from ..policy import Policy
from ..pretrained import fingerprint
from .checkpoint import WholeCheckpoints, warn_of_other_rewards
from .checks import check_trainer
from .diverged import check_gradients
from .optimizers import fuse_on_cpu
from .precision import check_quantised, exact_tensors_kept
from .schedule import LRDecay, schedule
from .sharding import device_only
from .stored import check_state, complete_averages, drop_base_of_averages

__all__ = ["PolicyModule"]

_CHECKPOINT_KEY = "clp_lightning"


def unavailable_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """Stands in a checkpoint for an optimizer without an import path; fails when training asks."""
    raise ValueError(_not_kept("optimizer"))


def unavailable_scheduler(optimizer: Optimizer) -> LRScheduler:
    """Stands in a checkpoint for a scheduler without an import path; fails when training asks."""
    raise ValueError(_not_kept("lr_scheduler"))


def _not_kept(argument: str) -> str:
    return (
        f"`{argument}` was a lambda or a function that cannot be imported by name, so the "
        f"checkpoint does not hold it. Pass it again: load_from_checkpoint(path, {argument}=...); "
        "functools.partial of a class is kept."
    )


class PolicyModule(Described, LightningModule):
    """A LightningModule around one policy whose checkpoints hold only what was trained.

    Args:
        policy: The policy; its weights are created in ``configure_model``.
        lr: Learning rate of the conditioned parameters.
        lr_shared: Learning rate of the shared ones; ``lr`` if None.
        weight_decay: Of all trained parameters. On a delta it is a hidden second KL.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        lr_decay: How it falls to 0 at the end of the run.
        optimizer: A torch optimizer class with its further arguments.
        lr_scheduler: A torch scheduler, stepped once per optimizer step.

    Attributes:
        exact_when_frozen: Whether a precision of the Trainer leaves frozen weights alone as well.
    """

    exact_when_frozen: ClassVar[bool] = False

    def __init__(
        self,
        policy: Policy,
        lr: float,
        lr_shared: float | None,
        weight_decay: float,
        warmup_steps: int,
        lr_decay: LRDecay,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        warnings.filterwarnings("ignore", message=r"Found \d+ module.* in eval mode")  # on purpose
        if not isinstance(policy.conditioner, Conditioner):
            raise ValueError(
                f"conditioner is {policy.conditioner!r}; give a Conditioner, such as LoRA()."
            )
        self.strict_loading = False  # the frozen base is not in the checkpoint
        self._record_hyperparameters()
        self.policy = policy
        # Python's numbers: the optimizer's state, and with it a checkpoint, must be plain data.
        self.lr = float(lr)
        self.lr_shared = float(lr if lr_shared is None else lr_shared)
        self.weight_decay = float(weight_decay)
        self.warmup_steps = int(warmup_steps)
        self.lr_decay = check_choice("lr_decay", lr_decay, get_args(LRDecay))
        numbers = (self.lr, self.lr_shared, self.warmup_steps)
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError(
                f"lr, lr_shared and warmup_steps must be finite and 0 or more; got {self.lr}, "
                f"{self.lr_shared} and {self.warmup_steps}."
            )
        if lr_decay != "none" and lr_scheduler is not None:
            raise ValueError(
                f"lr_decay={lr_decay!r} and an lr_scheduler both rule the learning rate; leave one "
                "out."
            )
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.trained_steps = 0
        self._base: dict[str, Any] | None = None

    def _record_hyperparameters(self) -> None:
        """Plain data, so that a checkpoint is read with ``weights_only`` and rebuilds itself."""
        if _given_hyperparameters.get() is not None:  # from a config: Lightning holds the dicts
            self.save_hyperparameters()
        else:
            self.save_hyperparameters(
                {
                    **self.described_arguments(),
                    "_instantiator": "lightning.pytorch.cli.instantiate_module",
                }
            )

    def described_arguments(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        arguments: dict[str, Any] = describe(self.init_args)
        substitutes: dict[str, Callable[..., Any]] = {
            "optimizer": unavailable_optimizer,
            "lr_scheduler": unavailable_scheduler,
        }
        for name, substitute in substitutes.items():
            if self.init_args.get(name) is not None and arguments[name] is None:
                arguments[name] = import_path(substitute)
        return arguments

    def configure_callbacks(self) -> list[Callback]:
        check_trainer(self)  # Lightning calls nothing of a module earlier
        return [WholeCheckpoints()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves everything, but converts only the frozen base to half precision."""
        if self.policy.is_sharded:  # already converted
            return super()._apply(device_only(fn), recurse)
        with exact_tensors_kept(self, frozen=self.exact_when_frozen):
            return super()._apply(fn, recurse)

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained_steps = self.global_step

    def configure_optimizers(self) -> Any:
        check_quantised(self.policy.model)
        conditioner = self.policy.conditioner
        shared = conditioner.shared()
        ids = {id(parameter) for parameter in shared}
        trained = self.policy.trained_parameters().values()
        conditioned = [parameter for parameter in trained if id(parameter) not in ids]
        groups = [
            {"params": parameters, "lr": lr, "weight_decay": self.weight_decay, "name": name}
            for name, parameters, lr in [
                ("conditioned", conditioned, self.lr),
                ("shared", shared, self.lr_shared),
            ]
            if parameters
        ]
        if not groups:
            raise ValueError(
                "Nothing of the policy is trained; let its conditioner train something: "
                "rest='train', or LoRA's shared_rank above 0."
            )
        groups += self.further_groups()
        optimizer = fuse_on_cpu(self.optimizer(groups))
        schedulers: list[LRScheduler] = []
        if self.warmup_steps or self.lr_decay != "none":
            steps = self.trainer.estimated_stepping_batches
            schedulers.append(schedule(optimizer, self.warmup_steps, self.lr_decay, steps))
        if self.lr_scheduler is not None:
            schedulers.append(self.lr_scheduler(optimizer))
        if not schedulers:
            return optimizer
        both = torch.optim.lr_scheduler.ChainedScheduler(schedulers, optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": "step"}}

    def further_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups beside the policy's, as torch takes them."""
        return []

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's.

        Raises:
            ValueError: the file is no whole checkpoint, or an argument was defined in a script or
                notebook that is not this one.
        """
        kwargs.setdefault("weights_only", True)  # which Lightning leaves out for what is remote
        path = args[0] if args else kwargs.get("checkpoint_path")
        if isinstance(path, (str, Path)):
            check_readable(path)
        try:
            with warnings.catch_warnings(), only_data(path):
                # The frozen base is meant to be missing; on_load_checkpoint looks for the rest.
                warnings.filterwarnings("ignore", message="Found keys that are in the model state")
                return super().load_from_checkpoint(*args, **kwargs)
        except (ArgumentError, ValueError) as error:
            if "__main__" not in str(error):
                raise
            raise ValueError(
                f"{error}\nIt was defined in another script or notebook. Move it to a module, or "
                "define it here too, or pass all rewards again: "
                "load_from_checkpoint(path, rewards={...})."
            ) from error

    # -- checkpoints -----------------------------------------------------------------------

    def base_identity(self) -> dict[str, Any]:
        """Name, revision and fingerprint of the base, its adapter if any; found once, on rank 0."""
        if self._base is None:
            spec = self.policy.pretrained
            found = {"name": spec.name, "revision": spec.revision}
            if spec.adapter is not None:
                found["adapter"] = spec.adapter
            mark = fingerprint(spec) if self.global_rank == 0 else None
            if self._trainer is not None and self.trainer.world_size > 1:
                mark = self.trainer.strategy.broadcast(mark, src=0)
            self._base = {**found, "fingerprint": mark}
        return self._base

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be loaded; subclasses add to it."""
        return {"base": self.base_identity()}

    def kept_state(self) -> Iterator[str]:
        """Names of the state that checkpoints hold: what is trained, and the library's buffers.

        The base's own buffers come with the base.
        """
        yield from (f"policy.{name}" for name in self.policy.trained_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = set(self.kept_state())
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in kept
        }
        drop_base_of_averages(checkpoint, kept)
        checkpoint[_CHECKPOINT_KEY] = {**self.identity(), "policy": self.described_policy()}

    def described_policy(self) -> dict[str, Any]:
        """What rebuilds the policy without this module, as plain data."""
        policy, trainer = self.policy, self._trainer
        callbacks: Any = getattr(trainer, "callbacks", [])  # which Lightning does not declare
        ranges = [getattr(callback, "alpha_range", None) for callback in callbacks]
        return {
            "pretrained": describe(policy.pretrained),
            "conditioner": describe(policy.conditioner),
            "encoding": describe(policy.encoding)["init_args"],
            "temperature": policy.temperature,
            "max_new_tokens": getattr(getattr(self, "sampling", None), "max_new_tokens", None),
            "alpha_range": next((list(found) for found in ranges if found is not None), None),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another base, other rewards or other trained tensors.

        Rewards of the same names but with other settings are warned of.

        Raises:
            ValueError: says what differs.
        """
        if self._trainer is not None and self.trainer.ckpt_path:
            readable(self.trainer.ckpt_path)  # torch compares no checksums
        stored = checkpoint.get(_CHECKPOINT_KEY)
        if stored is None:
            raise ValueError(
                "This checkpoint was not written by clp_lightning; give one of a CLP run."
            )
        own = self.identity()
        for key, value in own.items():
            self._check_identity(key, stored.get(key), value)
        state = self.state_dict()
        check_state(checkpoint["state_dict"], {name: state[name] for name in self.kept_state()})
        complete_averages(checkpoint, self)
        self.trained_steps = checkpoint["global_step"]

    @staticmethod
    def _check_identity(key: str, stored: Any, own: Any) -> None:
        if key == "base":
            if stored["fingerprint"] != own["fingerprint"]:
                raise ValueError(
                    f"The checkpoint was trained on another base: '{stored['name']}' "
                    f"(fingerprint {stored['fingerprint'][:12]}); this run has '{own['name']}' "
                    f"({own['fingerprint'][:12]}). Set `pretrained` to the checkpoint's base."
                )
        elif key == "reward_settings":
            warn_of_other_rewards(stored or {}, own)
        elif stored != own:
            raise ValueError(
                f"The checkpoint has {key} {stored}; this run has {own}. They must be the same, "
                "in the same order."
            )

    # -- one optimizer step over ranks and micro-batches ----------------------------------------

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up ``values`` over all processes; on one it is the identity."""
        if self.trainer.world_size == 1:
            return values
        reduced: Any = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        total: torch.Tensor = reduced.cpu()
        return total

    def scale_gradients(self, nominal: float, counted: float) -> float:
        """From the mean over ranks and micro-batches of (sum / nominal) to sum / ``counted``.

        Args:
            nominal: What every micro-batch's sum was divided by.
            counted: The number to divide by, over all ranks and micro-batches.

        Returns:
            Their norm.

        Raises:
            TrainingDiverged: they are not finite.
        """
        trainer = self.trainer
        factor = nominal * trainer.accumulate_grad_batches * trainer.world_size / max(counted, 1)
        grads = [p.grad for p in self.own_parameters() if p.grad is not None]
        if grads and factor != 1:
            torch._foreach_mul_(grads, factor)
        return check_gradients(self, grads)

    def trainer_state(self) -> Any:
        """What TRL's rewards may ask of the trainer; None without one."""
        if self._trainer is None:
            return None
        return SimpleNamespace(
            global_step=self.global_step,
            max_steps=self.trainer.max_steps,
            epoch=self.current_epoch,
        )

    def own_parameters(self) -> list[nn.Parameter]:
        """Everything that an optimizer holds."""
        further = [p for group in self.further_groups() for p in group["params"]]
        return [*self.policy.trained_parameters().values(), *further]
