"""The command line: fit, validate, test and predict on LightningCLI."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities.device_parser import _normalize_parse_gpu_string_input
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

# Known by their short names in a config: class_path: CLPModule.
from . import callbacks, conditioning, data, exact, modules, rewards  # noqa: F401
from .callbacks import FrontCallback, PredictionsCallback
from .callbacks.loggers import set_aside
from .checkpoints import checkpoint_file
from .keys import refuse_repeated_keys
from .mistakes import ShortErrors, refuse_no_values
from .modules.sharding import check_strategy

__all__ = ["CLI", "count_devices", "main"]


class Parser(ShortErrors, LightningArgumentParser):
    """Lightning's parser; what is wrong it says in a line."""


class CLI(LightningCLI):
    """LightningCLI with this library's defaults and, after ``fit``, a full front."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"seed_everything": 0, "trainer.use_distributed_sampler": False})

    def _parse_ckpt_path(self) -> None:
        """The command line decides, not the hyperparameters of a checkpoint.

        Lightning would let them replace what was asked for. A checkpoint that does not fit is
        refused when it is loaded.
        """

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ValueError(f"seed_everything: {error}.") from error

    def before_instantiate_classes(self) -> None:
        """Refuses what is no value; lets ``--ckpt_path`` name a run folder."""
        config = self.config.get(self.subcommand, {}) if self.subcommand else {}
        given: Any = config or self.config
        said = given.as_dict()
        trainer = said.pop("trainer")
        refuse_no_values(trainer, Trainer, "trainer")
        refuse_no_values(said)
        if (clip := trainer.get("gradient_clip_val") or 0) < 0:  # which Lightning takes for none
            raise ValueError(
                f"trainer.gradient_clip_val must be above 0; got {clip}. Leave it out for no "
                "clipping."
            )
        path = config.get("ckpt_path")
        if path is None and self.subcommand in ("validate", "test", "predict"):
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path measures the policy before training. "
                "Give the run's folder to measure a trained one."
            )
        if path not in (None, "last", "best", "hpc", "registry"):
            config["ckpt_path"] = str(checkpoint_file(path))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As Lightning's; what it cannot be made with is named."""
        asked = self.asked_of_trainer() | kwargs
        devices, strategy = asked["devices"], asked["strategy"]
        count_devices(devices)
        if isinstance(strategy, str) and strategy in StrategyRegistry:
            check_strategy(StrategyRegistry[strategy]["strategy"])
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:
            if "devices" not in str(error):
                raise
            raise ValueError(f"trainer.devices is {devices!r}: {error}") from error

    def asked_of_trainer(self) -> dict[str, Any]:
        """The Trainer's arguments in the config."""
        return {**self._get(self.config_init, "trainer", default={})}

    def before_fit(self) -> None:
        """A run that goes on keeps the rows that a CSV logger has written."""
        if self.config["fit"].get("ckpt_path") is not None:
            set_aside(self.trainer.loggers)

    def after_fit(self) -> None:
        """A run that was resumed behind its last step has trained nothing and swept nothing."""
        trainer: Any = self.trainer  # whose `callbacks` Lightning does not declare
        fronts = [c for c in trainer.callbacks if isinstance(c, FrontCallback)]
        # With a launcher that forks, this process has not seen what its children did.
        forks = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        unswept = fronts and not forks and not any(front.swept for front in fronts)
        if unswept and getattr(self.datamodule, "has_eval_prompts", True):
            # Loggers ask for this number, which a checkpoint of the last step has one too low.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self.trainer.validate(self.model, datamodule=self.datamodule)


class RunConfig(SaveConfigCallback):
    """Keeps the run's config beside its results; a resumed run may write it again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Evaluating does not change how a run was trained; nor does a resume that is refused."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            super().setup(trainer, pl_module, "fit")
        except TypeError as error:  # jsonargparse's, of a path that cannot be written
            raise OSError(
                f"The run's config.yaml cannot be written in {trainer.log_dir}: {error}. Give "
                "another save_dir of the logger, or without one another trainer.default_root_dir."
            ) from error


def count_devices(said: int | str | list[int]) -> int | None:
    """How many devices of a node a Trainer's ``devices`` are; None where the machine decides.

    Raises:
        ValueError: they are none.

    Example:
        >>> count_devices(2), count_devices("0,3"), count_devices([0]), count_devices("auto")
        (2, 2, 1, None)
    """
    if said == "auto":
        return None
    try:
        read = _normalize_parse_gpu_string_input(said)
        number = read if isinstance(read, int) else len(read)
    except ValueError:
        number = 0
    if number < 1 and number != -1:
        raise ValueError(
            f"trainer.devices is {said!r}; it takes how many devices of a node (2), which ones "
            "('0,1' or [0, 1]), or -1 or auto for all of them."
        )
    return None if number == -1 else number


def main(
    args: Sequence[str] | None = None, run: bool = True, kind: Callable[..., CLI] = CLI
) -> CLI:
    """Runs the command line.

    Args:
        args: Arguments without the program's name; those of the process if None.
        run: With False, nothing runs: ``args`` has no command, and the built model, data and
            trainer are in the result.
        kind: The class to make, or what makes it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisements)
    refuse_repeated_keys()
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        parser_class=Parser,
        trainer_defaults={
            "use_distributed_sampler": False,
            "callbacks": [PredictionsCallback()],
        },
        args=None if args is None else list(args),
        run=run,
    )


def _no_advertisements(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()
