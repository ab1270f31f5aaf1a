"""Whether the files of a model are whole, and what is said where they are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .attempts import attempt

__all__ = ["check_finite_weights", "check_weight_files", "loaded"]

T = TypeVar("T")
_POINTER = b"version https://git-lfs"
_REMEDY = "Fetch it again, or save it anew with save_pretrained."


def check_weight_files(files: Iterable[Path]) -> None:
    """Refuses safetensors files that are cut off or something else; reads their headers only.

    Raises:
        ValueError: names the file and what to do.
    """
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
            if start == _POINTER:
                raise ValueError(
                    f"{file} is a pointer of git-lfs, not the weights: run `git lfs pull` in the "
                    "repository that it comes from."
                )
            length = int.from_bytes(start[:8], "little")
            stream.seek(8)
            header = stream.read(length) if length <= size else b""
        try:
            entries = json.loads(header)
            ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{file} is no safetensors file, or the start of one. {_REMEDY}"
            ) from error
        if (whole := 8 + length + max(ends, default=0)) != size:
            raise ValueError(f"{file} has {size} bytes, but its header says {whole}. {_REMEDY}")


def loaded(name: str, load: Callable[[], T]) -> T:
    """What ``load()`` of another library returns.

    Args:
        name: The model, as the user gave it.
        load: Reads it.

    Raises:
        ValueError: names the model, whatever it was that ``load`` stumbled over. Errors of the
            operating system, missing packages and too little memory stay as they are.
    """
    outcome = attempt(load)
    error = outcome.exception()
    if error is None:
        return outcome.result()
    if isinstance(error, (OSError, ImportError, MemoryError)) or "memory" in str(error):
        raise error
    if isinstance(error, ValueError) and name in str(error):
        raise error
    raise ValueError(
        f"The model '{name}' cannot be loaded ({type(error).__name__}: {error}). Its config.json "
        "does not describe a model of Transformers, its files are damaged, or an argument of "
        f"`pretrained` does not suit it. {_REMEDY}"
    ) from error


def check_finite_weights(model: nn.Module, name: str) -> None:
    """Refuses weights that hold NaN or infinity, with which no loss is finite.

    Args:
        model: On any device; what is quantised or on the meta device is passed over.
        name: What they were loaded from, as the user gave it.

    Raises:
        ValueError: names the first tensor concerned.
    """
    for key, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta:
            continue
        # Least and largest: without a mask as large as the weights.
        if weight.numel() and not all(end.isfinite() for end in torch.aminmax(weight.detach())):
            raise ValueError(
                f"The weights of '{name}' are not finite: {key} holds NaN or infinity. "
                f"The files are damaged, or its training diverged. {_REMEDY}"
            )
