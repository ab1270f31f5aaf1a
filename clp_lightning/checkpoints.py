"""Where a run keeps its checkpoint, and whether that can be read."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile, ZipFile

__all__ = ["check_readable", "checkpoint_file"]


def checkpoint_file(run: str | Path) -> Path:
    """The checkpoint of ``run``: a .ckpt file, or a run folder with checkpoints/last.ckpt.

    Raises:
        FileNotFoundError: says where it was looked for.
        ValueError: the file is damaged.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {path}. Give a .ckpt file or the folder of a run "
            "(its trainer.log_dir)."
        )
    check_readable(path)
    return path


def check_readable(path: str | Path) -> None:
    """Refuses a local file that is not a whole checkpoint; looks at its directory only.

    Raises:
        ValueError: naming the file, from the error that says what is wrong with it.
    """
    if not Path(path).is_file():  # a folder of shards, or remote: left to Lightning
        return
    try:
        with ZipFile(path) as archive:
            (tree,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            archive.read(tree)  # compares its checksum
    except (BadZipFile, ValueError, OSError) as error:
        raise ValueError(
            f"The checkpoint {path} cannot be read: it is truncated, corrupt or no checkpoint "
            f"({type(error).__name__}: {error}). Take another one of the run."
        ) from error
