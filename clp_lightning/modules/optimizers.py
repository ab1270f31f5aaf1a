"""Muon for the matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW", "fuse_on_cpu"]


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` for every parameter with two axes, ``torch.optim.AdamW`` for the others.

    Muon scales its steps to the root mean square of AdamW's (``match_rms_adamw``), so one learning
    rate, one schedule and one weight decay serve both. Embeddings and output layers are matrices
    too here.

    Args:
        params: Parameters or groups of them; a group is split, its other entries stay.
        lr: Learning rate of groups that have none of their own.
        betas: Of AdamW.
        momentum: Of Muon.
        weight_decay: Of groups that have none of their own.

    Raises:
        ValueError: for values that Muon or AdamW refuse.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults)  # checks the groups
        groups = self.param_groups
        matrices = _narrow(groups, lambda parameter: parameter.ndim == 2)
        others = _narrow(groups, lambda parameter: parameter.ndim != 2)
        self._parts: list[Optimizer] = []
        if matrices:
            muon: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append(Muon(matrices, **defaults, **muon))
        if others:
            self._parts.append(AdamW(others, **defaults, betas=betas))
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_parts"):
            raise NotImplementedError("MuonAdamW takes all of its parameters at the start.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        # Schedules and checkpoints know of no parts, so the parts work on these groups and state.
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def _narrow(groups: list[dict[str, Any]], chosen: Callable[[Tensor], bool]) -> list[dict[str, Any]]:
    """The groups with the chosen parameters only; those that hold none are left out."""
    narrowed = [{**group, "params": [p for p in group["params"] if chosen(p)]} for group in groups]
    return [group for group in narrowed if group["params"]]


def fuse_on_cpu(optimizer: Optimizer) -> Optimizer:
    """Lets AdamW step by torch's fused kernel where the parameters are on the CPU.

    Torch's choice there is a loop over tensors with several passes over each. Only where the user
    left the choice open.
    """
    if type(optimizer) is AdamW:
        for group in optimizer.param_groups:
            # The kernel takes no account of gaps between a tensor's numbers.
            plain = all(
                type(p) is nn.Parameter and p.device.type == "cpu" and p.is_contiguous()
                for p in group["params"]
            )
            if plain and group["fused"] is None and group["foreach"] is None:
                # In the group, not in the constructor, after which Lightning refuses to clip.
                group["fused"] = True
    return optimizer
