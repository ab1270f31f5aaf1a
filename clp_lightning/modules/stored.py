"""The weights in a checkpoint: what is trained and not the base, averages of them too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["check_state", "complete_averages", "drop_base_of_averages"]

_CURRENT = "current_model_state"  # where Lightning's WeightAveraging keeps what it averages


def check_state(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Refuses weights that are not those of a configuration.

    Args:
        stored: Of a checkpoint.
        own: What the configuration trains.

    Raises:
        ValueError: names the first tensor that is missing, too many, or of another shape.
    """
    if missing := sorted(own.keys() - stored.keys()):
        raise ValueError(
            f"The checkpoint lacks {len(missing)} trained tensors of this configuration, "
            f"first {missing[0]}. Was it trained with another conditioner?"
        )
    if extra := sorted(stored.keys() - own.keys()):
        raise ValueError(
            f"The checkpoint holds {len(extra)} tensors that this configuration does not "
            f"train, first {extra[0]}. Was it trained with another conditioner?"
        )
    for name, value in stored.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint and "
                f"{tuple(own[name].shape)} here. Was it trained with another rank?"
            )


def drop_base_of_averages(checkpoint: dict[str, Any], kept: Iterable[str]) -> None:
    """Leaves of the weights that are averaged what is in ``kept``; without averages nothing.

    Args:
        checkpoint: As a Trainer is about to save it.
        kept: Names of parameters.
    """
    if _CURRENT in checkpoint:
        state = checkpoint[_CURRENT]
        checkpoint[_CURRENT] = {name: state[name] for name in kept}


def complete_averages(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Adds the base where WeightAveraging asks for all weights; without averages nothing.

    Args:
        checkpoint: As a Trainer has read it; what it holds has been looked at.
        module: The base is that of its own weights.
    """
    if _CURRENT in checkpoint:
        own = module.state_dict()
        for key in ("state_dict", _CURRENT):
            checkpoint[key] = own | checkpoint[key]
