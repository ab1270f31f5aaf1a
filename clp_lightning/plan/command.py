"""The command ``plan``."""

from __future__ import annotations

import json as json_format
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

from ..callbacks import CLPCallback
from ..cli import CLI, main
from ..modules import CLPModule
from ..tables import print_table
from .devices import Layout, gathered_bytes, on_each_device
from .rehearsal import Load, rehearse

__all__ = ["plan"]

# What a plan does without: it must be made on a machine that is not the one it is for.
_HERE = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
    "--trainer.plugins=null",
    "--trainer.logger=false",
]
_GB = 10**9


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
    """
    trainer: dict[str, Any] = (yaml.safe_load(Path(config).read_text()) or {}).get("trainer") or {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = main(["--config", config, *_HERE], run=False)
    module: Any = cli.model
    if not isinstance(module, CLPModule):
        raise ValueError(f"plan counts the step of a CLPModule; {config} has another module.")
    layout = read_layout(trainer, devices)
    load = _load(cli, trainer, prompt_tokens)
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


def _load(cli: CLI, trainer: Mapping[str, Any], prompt_tokens: int | None) -> Load:
    module: Any = cli.model
    prompts = getattr(cli.datamodule, "batch_size", None)
    if prompts is None:
        raise ValueError(f"{type(cli.datamodule).__name__} has no batch_size to plan with.")
    callbacks: Any = cli.trainer.callbacks  # type: ignore[attr-defined]
    per = next((c.per for c in callbacks if isinstance(c, CLPCallback)), None)
    merges = module.policy.conditioner.one_preference_per_batch
    return Load(
        prompts=prompts,
        prompt_tokens=prompt_tokens or module.policy.encoding.max_prompt_tokens,
        accumulate=trainer.get("accumulate_grad_batches") or 1,
        one_preference=merges or per in ("batch", "step"),
        dtype=_dtype(trainer.get("precision")),
        foreach=trainer.get("accelerator", "auto") != "cpu",
    )


def _dtype(precision: Any) -> torch.dtype | None:
    names = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    return names.get(str(precision))


def read_layout(trainer: Mapping[str, Any], devices: int | None) -> Layout:
    """The layout that a config's ``trainer`` asks for.

    Args:
        trainer: Its arguments.
        devices: Another number of devices, over all nodes.

    Example:
        >>> read_layout({"devices": 4, "num_nodes": 2}, None)
        Layout(devices=8, shard_group=1)
        >>> strategy = {"class_path": "ModelParallelStrategy", "init_args": {}}
        >>> read_layout({"devices": 8, "strategy": strategy}, None)
        Layout(devices=8, shard_group=8)
    """
    nodes = int(trainer.get("num_nodes") or 1)
    if devices is None:
        devices = nodes * _devices_of_a_node(trainer.get("devices", "auto"))
    strategy = trainer.get("strategy") or "auto"
    options: Mapping[str, Any] = {}
    if isinstance(strategy, Mapping):
        strategy, options = strategy["class_path"], strategy.get("init_args") or {}
    if not strategy.rpartition(".")[2].lower().startswith(("modelparallel", "fsdp")):
        return Layout(devices)
    group = options.get("data_parallel_size", "auto")
    return Layout(devices, devices if group == "auto" else min(int(group), devices))


def _devices_of_a_node(said: Any) -> int:
    if isinstance(said, Sequence) and not isinstance(said, str):
        return len(said)
    if str(said) in ("auto", "-1"):
        raise ValueError(
            f"The config leaves the number of devices to the machine (devices: {said}), which "
            "need not be this one: give --devices."
        )
    return int(said)


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
