"""The command ``plan``."""

from __future__ import annotations

import json as json_format
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.table import Table

from ..callbacks import CLPCallback
from ..cli import CLI, count_devices, main
from ..modules import CLPModule
from ..modules.ahead import check_sampling
from ..tables import print_table
from .devices import Layout, gathered_bytes, on_each_device
from .rehearsal import Load, rehearse

__all__ = ["plan"]

# What a plan does without: it must be made on a machine that is not the one it is for.
_LEFT_OUT = ["--trainer.plugins=null", "--trainer.logger=false"]
_GB = 10**9


class _There(CLI):
    """A CLI for as many devices as the config asks for, which need not be of this machine.

    Args:
        given: How many there are over all nodes; as the config says if None.
    """

    def __init__(self, *args: Any, given: int | None, **kwargs: Any) -> None:
        self.given = given
        super().__init__(*args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """One that starts nothing, on as many processes of this machine."""
        asked = self.asked_of_trainer()
        devices, nodes = asked["devices"], asked["num_nodes"]
        number = count_devices(devices)
        if self.given is not None:
            devices, nodes = self.given, 1
        elif number is None:
            raise ValueError(
                f"The config leaves the number of devices to the machine (devices: {devices}), "
                "which need not be this one: give --devices."
            )
        elif asked["accelerator"] != "cpu":  # where a list of devices is a mistake
            devices = number
        here = {"accelerator": "cpu", "precision": "32-true", "plugins": [LightningEnvironment()]}
        return super().instantiate_trainer(**here, devices=devices, num_nodes=nodes, **kwargs)


def plan(
    config: str,
    prompt_tokens: int | None = None,
    devices: int | None = None,
    memory: float = 80.0,
    json: bool = False,
) -> dict[str, Any]:
    """Says how much memory a run of ``fit`` takes on each device, by part, and whether it fits.

    One training step is rehearsed on the meta device, with responses as long as they may be: no
    weight is loaded and nothing is computed. What kernels use inside, the CUDA context and
    fragmentation are not in it, nor are the activations of reward models; leave a tenth free. With
    ``precision: bf16-mixed`` activations are counted in float32.

    Args:
        config: A config of ``fit``.
        prompt_tokens: Length of the longest prompts; the limit, ``max_prompt_tokens``, if left out.
        devices: Number of devices over all nodes; that of the config if left out.
        memory: What a device has, in GB (10^9 bytes).
        json: Print the numbers, in bytes, instead of a table.

    Raises:
        ValueError: ``fit`` would refuse the config, or an option is out of its range.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"--devices is {devices}; it must be at least 1.")
    if not 0 < memory < float("inf"):
        raise ValueError(f"--memory is {memory:g}; it must be finite and above 0, in GB.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = main(["--config", config, *_LEFT_OUT], run=False, kind=partial(_There, given=devices))
    module: Any = cli.model
    if not isinstance(module, CLPModule):
        raise ValueError(f"plan counts the step of a CLPModule; {config} has another module.")
    assert isinstance(cli, _There)
    _check(cli)
    layout = _layout(cli.trainer)
    load = _load(cli, prompt_tokens)
    load.shard_group = layout.shard_group
    alone = rehearse(module, load)
    phases = on_each_device(alone, layout, gathered_bytes(module.policy))
    peak = max(sum(parts.values()) for parts in phases.values())
    found = {
        "devices": layout.devices,
        "shard_group": layout.shard_group,
        "prompts": load.prompts,
        "prompt_tokens": load.prompt_tokens,
        "phases": phases,
        "peak": peak,
        "fits": peak <= memory * _GB,
    }
    _print(found, layout, memory, as_json=json)
    return found


def _check(cli: CLI) -> None:
    """Refuses what ``fit`` refuses before it reads data or weights."""
    module: Any = cli.model
    trainer: Any = cli.trainer
    module.trainer, trainer.datamodule = trainer, cli.datamodule
    own = [callback for callback in trainer.callbacks if isinstance(callback, CLPCallback)]
    for callback in [*module.configure_callbacks(), *own]:
        callback.setup(trainer, module, "fit")
    check_sampling(module)
    module.trainer = None


def _layout(trainer: Trainer) -> Layout:
    world = trainer.world_size
    return Layout(world, world if isinstance(trainer.strategy, ModelParallelStrategy) else 1)


def _load(cli: _There, prompt_tokens: int | None) -> Load:
    module: Any = cli.model
    trainer: Any = cli.trainer
    asked = cli.asked_of_trainer()
    limit = module.policy.encoding.max_prompt_tokens
    if prompt_tokens is not None and not 1 <= prompt_tokens <= limit:
        raise ValueError(
            f"--prompt_tokens is {prompt_tokens}; it must be 1 to max_prompt_tokens, which is "
            f"{limit}."
        )
    prompts = getattr(cli.datamodule, "batch_size", None)
    if prompts is None:
        raise ValueError(f"{type(cli.datamodule).__name__} has no batch_size to plan with.")
    per = next((c.per for c in trainer.callbacks if isinstance(c, CLPCallback)), None)
    merges = module.policy.conditioner.one_preference_per_batch
    return Load(
        prompts=prompts,
        prompt_tokens=limit if prompt_tokens is None else prompt_tokens,
        accumulate=trainer.accumulate_grad_batches,
        one_preference=merges or per in ("batch", "step"),
        dtype=_dtype(asked["precision"]),
        foreach=asked["accelerator"] != "cpu",
    )


def _dtype(precision: Any) -> torch.dtype | None:
    names = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    return names.get(str(precision))


def _print(found: Mapping[str, Any], layout: Layout, memory: float, *, as_json: bool) -> None:
    if as_json:
        print(json_format.dumps(found, indent=1))
        return
    phases: Mapping[str, Mapping[str, int]] = found["phases"]
    table = Table(title="GB on each device (computed, not run)")
    for heading in ("", *phases):
        table.add_column(heading, justify="right")
    for part in next(iter(phases.values())):
        table.add_row(part, *(f"{parts[part] / _GB:.2f}" for parts in phases.values()))
    totals = [sum(parts.values()) for parts in phases.values()]
    table.add_section()
    table.add_row("total", *(f"{total / _GB:.2f}" for total in totals))
    print_table(table)
    verdict = "fits into" if found["fits"] else "does not fit into"
    print(f"plan: {found['peak'] / _GB:.2f} GB at the peak {verdict} {memory:g} GB ({layout})")
