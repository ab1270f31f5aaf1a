"""From one device that holds everything to many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..policy import Policy
from ..policy.blocks import blocks

__all__ = ["Layout", "gathered_bytes", "on_each_device"]

_SHARDED = ("base", "deltas", "gradients", "optimizer", "merged copy")


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


def on_each_device(
    phases: Mapping[str, Mapping[str, int]], layout: Layout, gathered: int
) -> dict[str, dict[str, int]]:
    """What ``rehearse`` found for one device, on each of many; the batch of a device is the same.

    Args:
        phases: Bytes by phase and part.
        layout: How the weights lie.
        gathered: Bytes of the weights that a sharded strategy holds whole at a time.

    Returns:
        The same, with a part ``communication``: gathered layers, or DDP's gradient buckets.

    Example:
        >>> alone = {"gradient": {"base": 80, "gradients": 8, "activations": 5}}
        >>> on_each_device(alone, Layout(8, shard_group=8), gathered=20)["gradient"]
        {'base': 10, 'gradients': 1, 'activations': 5, 'communication': 20}
        >>> on_each_device(alone, Layout(8), gathered=20)["gradient"]["communication"]
        8
    """
    share = layout.shard_group
    found: dict[str, dict[str, int]] = {}
    for phase, parts in phases.items():
        # What an optimizer computes with is of its parameters' size.
        sharded = (*_SHARDED, "activations") if phase == "update" else _SHARDED
        own = {part: -(-n // share) if part in sharded else n for part, n in parts.items()}
        buckets = phases["gradient"]["gradients"] if layout.devices > 1 else 0
        own["communication"] = gathered if share > 1 else buckets
        found[phase] = own
    return found


def gathered_bytes(policy: Policy) -> int:
    """What a sharded strategy holds whole: all but the blocks, and two blocks (one is fetched)."""

    def size(parameters: object) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)  # type: ignore[attr-defined]

    each = [size(block.parameters()) for block in blocks(policy.model)]
    return size(policy.parameters()) - sum(each) + 2 * max(each, default=0)
