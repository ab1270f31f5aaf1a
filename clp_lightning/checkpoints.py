"""Where a run keeps its checkpoint, and whether that can be read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

__all__ = [
    "LAST",
    "PREVIOUS",
    "check_readable",
    "checkpoint_file",
    "damaged",
    "only_data",
    "readable",
]

LAST = "last.ckpt"
"""The newest checkpoint of a run."""
PREVIOUS = "previous.ckpt"
"""The one before it, beside it."""
_OF_SHARDS = "meta.pt"  # in a checkpoint that is a folder


def checkpoint_file(run: str | Path) -> Path:
    """The checkpoint of ``run``: a .ckpt file, or a run folder with checkpoints/last.ckpt.

    Where that is missing or damaged it is the one before, with a warning.

    Raises:
        FileNotFoundError: says where it was looked for.
        ValueError: the file is damaged.
    """
    path = Path(run)
    if path.is_dir() and path.suffix != ".ckpt":
        path = path / "checkpoints" / LAST
    if not path.exists() and not (path.name == LAST and path.with_name(PREVIOUS).is_file()):
        raise FileNotFoundError(
            f"There is no checkpoint at {path}. Give a .ckpt file or the folder of a run "
            "(its trainer.log_dir)."
        )
    found = readable(path)
    if found != path:
        warnings.warn(damaged(path, found), stacklevel=2)
    return found


def damaged(path: str | Path, found: str | Path) -> str:
    """Says that ``found`` is read instead of ``path``."""
    how = "damaged" if Path(path).exists() else "missing"
    return f"The checkpoint {path} is {how}; {found}, the one before it, is taken."


def readable(path: str | Path, *, thorough: bool = False) -> Path:
    """``path``; for a last.ckpt that is missing or damaged the one before it, if that is whole.

    Args:
        path: A checkpoint.
        thorough: Read all of it, as ``check_readable`` does.

    Raises:
        ValueError: neither is whole; see ``check_readable``.
    """
    path = Path(path)
    before = path.with_name(PREVIOUS)
    has_before = path.name == LAST and before.is_file()
    if has_before and not path.exists():
        check_readable(before, thorough=thorough)
        return before
    try:
        check_readable(path, thorough=thorough)
    except ValueError as error:
        if not has_before or path.is_dir():
            raise
        try:
            check_readable(before, thorough=thorough)
        except ValueError:
            raise error from error.__cause__
        return before
    return path


@contextmanager
def only_data(path: Any) -> Iterator[None]:
    """Says of a checkpoint that is not unpickled what it is, inside the block.

    Raises:
        ValueError: from torch's error, which would advise to unpickle it.
    """
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, which is not unpickled, because "
            "it could run any code; a checkpoint of clp_lightning does not. Was it written by "
            "something else?"
        ) from error


def check_readable(path: str | Path, *, thorough: bool = False) -> None:
    """Refuses a local file that is not a whole checkpoint.

    Args:
        path: A checkpoint.
        thorough: Compare the checksums of all tensors; otherwise look at its directory only.

    Raises:
        ValueError: naming the file, from the error that says what is wrong with it.
    """
    if Path(path).is_dir() and not Path(path, _OF_SHARDS).is_file():
        raise ValueError(
            f"The checkpoint {path} is a folder, and not one that Lightning writes. Remove or "
            f"rename it; the run goes on from {PREVIOUS} beside it, if there is one."
        )
    if not Path(path).is_file():  # a folder of shards, or remote: left to Lightning
        return
    try:
        with ZipFile(path) as archive:
            (tree,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            archive.read(tree)  # compares its checksum
            if thorough and (broken := archive.testzip()):
                raise ValueError(f"the checksum of {broken} differs")
    except (BadZipFile, ValueError, OSError) as error:
        raise ValueError(
            f"The checkpoint {path} cannot be read: it is truncated, corrupt or no checkpoint "
            f"({type(error).__name__}: {error}). Take another one of the run."
        ) from error
