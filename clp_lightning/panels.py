"""What all pictures of fronts share: a figure of panels, and which rewards stand in one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARKERS", "axis_label", "drawn", "new_panels", "reward_pairs"]

MARKERS = "osD^vPX"
_MAX_PAIRS = 6


def new_panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, so that nothing has to be closed, and its panels.

    Args:
        count: Number of panels.
        columns: In how many columns.
        width: Of one panel, in inches.
        height: Likewise.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = 'A picture needs matplotlib: pip install "clp_lightning[plots]"'
        raise ModuleNotFoundError(message) from error

    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, list(axes[:count])


def reward_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The first six pairs of rewards; KL and the reward where there is only one.

    Example:
        >>> reward_pairs(["a", "b", "c"]), reward_pairs(["a"])
        ([('a', 'b'), ('a', 'c'), ('b', 'c')], [('kl', 'a')])
    """
    return [*combinations(names, 2)][:_MAX_PAIRS] or [("kl", names[0])]


def axis_label(axis: str, names: Sequence[str]) -> str:
    """Of a reward, or of ``kl``."""
    return axis if axis in names else "KL to the reference, nats per response"


def drawn(value: float | None) -> float:
    """NaN, which is not drawn, for what is undefined."""
    return float("nan") if value is None else value
