"""Reads what a training run left, without a Trainer and without its rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import checkpoint_file, only_data
from ..pretrained import as_pretrained
from .trained import Trained

__all__ = ["read_checkpoint", "read_rewards", "run_folder"]


def run_folder(run: str | Path) -> Path:
    """The folder of the run that a checkpoint or run folder belongs to."""
    file = checkpoint_file(run)
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def read_checkpoint(run: str | Path) -> Trained:
    """What ``run`` trained: a run folder, or a .ckpt file.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not one of a policy with a dial.
    """
    file, checkpoint = _load(run)
    identity = checkpoint.get("clp_lightning")
    if identity is None:
        raise ValueError(f"{file} was not written by clp_lightning; give one of a CLP run.")
    if not identity.get("rewards"):
        raise ValueError(f"{file} holds no policy with a dial: it was trained without rewards.")
    settings = identity.get("policy") or _older(checkpoint["hyper_parameters"])
    names = list(identity["rewards"])
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return Trained(
        pretrained=as_pretrained(settings["pretrained"]),
        fingerprint=identity["base"]["fingerprint"],
        conditioner=settings["conditioner"],
        encoding=settings["encoding"],
        temperature=settings["temperature"],
        max_new_tokens=settings["max_new_tokens"],
        rewards=names,
        statistics=_statistics(state, names),
        alpha_range=settings["alpha_range"],
        front=_front(run_folder(run) / "front.json", checkpoint["global_step"]),
        state={
            name.removeprefix("policy."): value
            for name, value in state.items()
            if name.startswith("policy.")
        },
    )


def read_rewards(run: str | Path) -> dict[str, Any]:
    """The rewards of ``run`` by name, as its checkpoint describes them: objects or import paths.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its module had no argument ``rewards``.
    """
    file, checkpoint = _load(run)
    rewards: dict[str, Any] | None = checkpoint.get("hyper_parameters", {}).get("rewards")
    if not rewards:
        raise ValueError(f"{file} does not say which rewards it was trained with.")
    return rewards


def _front(file: Path, step: int) -> dict[str, Any] | None:
    """The run's front, if it was measured on these weights and not after more or fewer steps."""
    if not file.is_file():
        return None
    front: dict[str, Any] = json.loads(file.read_text())
    return front if front.get("global_step", step) == step else None


def _load(run: str | Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's file and contents; of tensors that nobody uses, nothing is read."""
    file = checkpoint_file(run)
    with only_data(file):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, not a run's checkpoint.")
    return file, checkpoint


def _older(settings: dict[str, Any]) -> dict[str, Any]:
    """From a module's settings: checkpoints did not always describe their policy."""
    encoding = ("max_prompt_tokens", "on_long", "chat_template_kwargs")
    return settings | {"encoding": {name: settings[name] for name in encoding}, "alpha_range": None}


def _statistics(state: dict[str, Tensor], names: list[str]) -> dict[str, list[float]] | None:
    if not bool(state.get("rewards.fitted", False)):
        return None
    pairs: list[Any] = torch.stack([state["rewards.mean"], state["rewards.std"]], 1).tolist()
    return dict(zip(names, pairs, strict=True))
