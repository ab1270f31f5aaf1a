"""Where a run keeps its checkpoint."""

from __future__ import annotations

from pathlib import Path

__all__ = ["checkpoint_file"]


def checkpoint_file(run: str | Path) -> Path:
    """The checkpoint of ``run``: a .ckpt file, or a run folder with checkpoints/last.ckpt.

    Raises:
        FileNotFoundError: says where it was looked for.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {path}. Give a .ckpt file or the folder of a run "
            "(its trainer.log_dir)."
        )
    return path
