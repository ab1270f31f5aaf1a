"""The command ``compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..tables import print_table
from .figure import plot_comparison
from .methods import compare_methods
from .read import read_methods
from .table import flat_rows, markdown, terminal_tables

__all__ = ["compare", "compare_fronts"]


def compare(runs: list[str], out: str, against: str | None = None) -> dict[str, Any]:
    """Puts fronts of the same prompts, preferences and rewards beside each other.

    Writes compare.md, compare.csv, compare.json and compare.png, and prints the table.

    Args:
        runs: Each [LABEL=]PATH[+PATH...], as bare arguments. PATH is a run's folder, its .ckpt, a
            saved policy's folder with front files, or a front.json; front_samples.parquet lies
            beside it. Runs of one label are the seeds of a method; without a label it is the
            folder's name less a last -N. LABEL=A+B+C is one seed whose points come from several
            runs, such as an oracle with a run for each weighting: their costs are added up.
        out: Folder of what is written; made if there is none.
        against: Label of the method that the others are tested against; the first if left out.

    Returns:
        The contents of compare.json.
    """
    comparison = compare_fronts(runs, against)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison, indent=1, allow_nan=False)
    (folder / "compare.json").write_text(text + "\n")
    pd.DataFrame(flat_rows(comparison)).to_csv(folder / "compare.csv", index=False)
    picture = _draw(comparison, folder / "compare.png")
    (folder / "compare.md").write_text(markdown(comparison, picture))
    for table in terminal_tables(comparison):
        print_table(table)
    for warning in comparison["warnings"]:
        print(f"warning: {warning}")
    print(f"compare: {folder / 'compare.md'}", flush=True)
    return comparison


def compare_fronts(runs: Sequence[str | Path], against: str | None = None) -> dict[str, Any]:
    """The numbers of ``compare``, without a file.

    Args:
        runs: See ``compare``.
        against: Label of the method that the others are tested against; the first if None.

    Returns:
        The contents of compare.json; None is undefined or unknown.

    Raises:
        FileNotFoundError: says what is missing.
        ValueError: says what differs, where fronts cannot be compared.
    """
    return compare_methods(read_methods(runs), against)


def _draw(comparison: dict[str, Any], path: Path) -> bool:
    """Writes the picture, if matplotlib is there."""
    try:
        figure = plot_comparison(comparison)
    except ModuleNotFoundError as error:
        print(f"No {path.name}: {error}")
        return False
    figure.savefig(path, format="png", dpi=120)
    return True
