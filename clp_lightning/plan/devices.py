"""From one device that holds everything to many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..policy import Policy
from ..policy.blocks import blocks

__all__ = ["SHARDED", "Gathered", "Layout", "gathered_bytes", "on_each_device"]

SHARDED = ("base", "deltas", "gradients", "optimizer", "merged copy")


@dataclass
class Layout:
    """How the weights lie on the devices.

    Attributes:
        devices: How many there are, over all nodes.
        shard_group: How many of them share one copy of the weights; 1 is a copy on each (DDP).
    """

    devices: int = 1
    shard_group: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"The number of devices must be at least 1; got {self.devices}.")
        if self.shard_group < 1 or self.devices % self.shard_group:
            raise ValueError(
                f"{self.shard_group} devices in a shard group do not divide {self.devices} devices."
            )

    def __str__(self) -> str:
        if self.shard_group > 1:
            return f"{self.devices} devices, weights sharded over {self.shard_group}"
        return "1 device" if self.devices == 1 else f"{self.devices} devices, a copy on each"


@dataclass
class Gathered:
    """Bytes that every device of a shard group holds whole at a time.

    Attributes:
        weights: Of the layers that it computes with, deltas included.
        gradients: Of what is trained in them, before they are summed and split.
    """

    weights: int
    gradients: int


def on_each_device(
    phases: Mapping[str, Mapping[str, int]], layout: Layout, gathered: Gathered
) -> dict[str, dict[str, int]]:
    """What ``rehearse`` found for one device, on each of many; the batch of a device is the same.

    Args:
        phases: Bytes by phase and part.
        layout: How the weights lie.
        gathered: What a sharded strategy holds whole at a time.

    Returns:
        The same, with a part ``communication``: gathered layers, or DDP's gradient buckets.

    Example:
        >>> alone = {"gradient": {"base": 80, "gradients": 8, "activations": 5}}
        >>> whole = Gathered(weights=20, gradients=6)
        >>> on_each_device(alone, Layout(8, shard_group=8), whole)["gradient"]
        {'base': 10, 'gradients': 1, 'activations': 5, 'communication': 26}
        >>> on_each_device(alone, Layout(8), whole)["gradient"]["communication"]
        8
    """
    share = layout.shard_group
    found: dict[str, dict[str, int]] = {}
    for phase, parts in phases.items():
        # What an optimizer computes with is of its parameters' size.
        sharded = (*SHARDED, "activations") if phase == "update" else SHARDED
        own = {part: -(-n // share) if part in sharded else n for part, n in parts.items()}
        own["communication"] = _communicated(phases, phase, layout, gathered)
        found[phase] = own
    return found


def _communicated(
    phases: Mapping[str, Mapping[str, int]], phase: str, layout: Layout, gathered: Gathered
) -> int:
    if layout.shard_group == 1:
        return phases["gradient"]["gradients"] if layout.devices > 1 else 0
    if phase == "update":
        return 0  # of shards
    return gathered.weights + (gathered.gradients if phase == "gradient" else 0)


def gathered_bytes(policy: Policy) -> Gathered:
    """What a sharded strategy holds whole: all but the blocks, and two blocks (one is fetched).

    Args:
        policy: Rehearsed with its ``shard_group``, so that deltas lie in the blocks they belong to.
    """
    whole = _size(policy.parameters())
    trained = _size(policy.parameters(), trained=True)
    each = [
        (_size(block.parameters()), _size(block.parameters(), trained=True))
        for block in blocks(policy.model)
    ]
    first, second = (list(sizes) for sizes in zip(*each, strict=True)) if each else ([], [])
    return Gathered(
        whole - sum(first) + 2 * max(first, default=0),
        trained - sum(second) + 2 * max(second, default=0),
    )


def _size(parameters: Iterable[nn.Parameter], trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad or not trained)
