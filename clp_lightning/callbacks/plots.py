"""The picture of a front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..panels import MARKERS, axis_label, drawn, new_panels, reward_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_front"]


def plot_front(front: Mapping[str, Any]) -> Figure:
    """Reward against reward for the first six pairs; reward against KL where there is only one.

    Args:
        front: The contents of a front.json.

    Returns:
        A figure that belongs to no window: nothing has to be closed.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    pairs = reward_pairs(front["rewards"])
    figure, axes = new_panels(len(pairs), min(3, len(pairs)), 4.4, 3.6)
    for ax, (x, y) in zip(axes, pairs, strict=True):
        _draw(ax, front, x, y)
    axes[0].legend(fontsize="small")
    return figure


def _draw(ax: Axes, front: Mapping[str, Any], x: str, y: str) -> None:
    """One panel: a marker per alpha, coloured by the weight of ``x``, and the reference."""
    alphas = sorted({point["alpha"] for point in front["points"]})
    for i, alpha in enumerate(alphas):
        points = [point for point in front["points"] if point["alpha"] == alpha]
        ax.scatter(
            [_at(point, x) for point in points],
            [_at(point, y) for point in points],
            c=[point["weights"].get(x, 1.0) for point in points],
            vmin=0,
            vmax=1,
            marker=MARKERS[i % len(MARKERS)],
            label=f"alpha {alpha:g}",
        )
    reference = front["reference"]
    ax.scatter(_at(reference, x), _at(reference, y), c="black", marker="*", s=90, label="reference")
    if x in front["rewards"]:
        ax.figure.colorbar(ax.collections[0], ax=ax, label=f"weight of {x}")
    ax.set_xlabel(axis_label(x, front["rewards"]))
    ax.set_ylabel(y)


def _at(point: Mapping[str, Any], axis: str) -> float:
    """A coordinate; NaN, which is not drawn, for one that is undefined."""
    value = point["kl"] if axis == "kl" and "kl" not in point["rewards"] else point["rewards"][axis]
    return drawn(value)
