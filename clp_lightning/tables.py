"""Numbers as people read them: the rows of a front, and a table on a terminal or in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["markdown_table", "point_cells", "point_label", "print_table"]


def point_label(point: Mapping[str, Any], names: Sequence[str]) -> str:
    """The weights of a point of a front.json.

    Example:
        >>> point_label({"weights": {"short": 0.25, "kind": 0.75}}, ["kind", "short"])
        '0.75 / 0.25'
    """
    return " / ".join(f"{point['weights'][name]:.2f}" for name in names)


def point_cells(point: Mapping[str, Any], names: Sequence[str], value: float | None) -> list[str]:
    """Raw rewards, KL, length and ``value`` of a point, or of the reference; "-" is undefined."""
    numbers = [point["rewards"][name] for name in names] + [point["kl"], point["length"], value]
    return ["-" if number is None else f"{number:.3g}" for number in numbers]


def print_table(table: Table) -> None:
    """Prints a table; a file or a pipe has no width of its own."""
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    r"""A table in Markdown; bars and line breaks in cells are escaped.

    Example:
        >>> print(markdown_table(["w", "V"], [["a|b", 1]]))
        | w | V |
        | --- | --- |
        | a\|b | 1 |
    """
    lines = [list(columns), ["---"] * len(columns), *rows]
    texts = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in texts)
