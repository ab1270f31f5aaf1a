"""The picture of a front."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_front"]

_MARKERS = "osD^vPX"
_MAX_PANELS = 6


def plot_front(front: Mapping[str, Any]) -> Figure:
    """Reward against reward for the first six pairs; reward against KL where there is only one.

    Args:
        front: The contents of a front.json.

    Returns:
        A figure that belongs to no window: nothing has to be closed.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = 'plot_front needs matplotlib: pip install "clp_lightning[plots]"'
        raise ModuleNotFoundError(message) from error

    names = front["rewards"]
    pairs = list(combinations(names, 2))[:_MAX_PANELS] or [("kl", names[0])]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (x, y) in zip(axes, pairs, strict=False):
        _draw(ax, front, x, y)
    for ax in axes[len(pairs) :]:
        ax.set_axis_off()
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
            marker=_MARKERS[i % len(_MARKERS)],
            label=f"alpha {alpha:g}",
        )
    reference = front["reference"]
    ax.scatter(_at(reference, x), _at(reference, y), c="black", marker="*", s=90, label="reference")
    if x in front["rewards"]:
        ax.figure.colorbar(ax.collections[0], ax=ax, label=f"weight of {x}")
    ax.set_xlabel(x if x in front["rewards"] else "KL to the reference, nats per response")
    ax.set_ylabel(y)


def _at(point: Mapping[str, Any], axis: str) -> float:
    """A coordinate; NaN, which is not drawn, for one that is undefined."""
    value = point["kl"] if axis == "kl" and "kl" not in point["rewards"] else point["rewards"][axis]
    return float("nan") if value is None else value
