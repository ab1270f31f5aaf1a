"""The figure of a comparison: fronts over each other, V and closed gap by preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..panels import MARKERS, axis_label, drawn, new_panels, reward_pairs
from ..tables import point_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison"]

_LINES = ("-", "--", ":", "-.")


def plot_comparison(comparison: Mapping[str, Any]) -> Figure:
    """Reward against reward for the first six pairs; V, its differences and closed gaps.

    Args:
        comparison: The contents of a compare.json.

    Returns:
        A figure that belongs to no window: nothing has to be closed.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    methods = comparison["methods"]
    by_preference = {
        "value": "V (black: reference)",
        "value_difference": f"V minus that of {comparison['against']}",
        "closed_gap": "closed gap",
        "closed_gap_unseen": "closed gap, unseen contexts",
    }
    known = {name for m in methods for p in m["points"] for name in by_preference if p.get(name)}
    panels: list[tuple[str, ...]] = [*reward_pairs(comparison["rewards"])]
    panels += [(name,) for name in by_preference if name in known]
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    figure, axes = new_panels(len(panels), columns, 4.8, 4.0)
    for ax, panel in zip(axes, panels, strict=True):
        if len(panel) == 2:
            _draw_front(ax, comparison, *panel)
        else:
            _draw_by_preference(ax, comparison, *panel)
            ax.set_ylabel(by_preference[panel[0]])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def _draw_front(ax: Axes, comparison: Mapping[str, Any], x: str, y: str) -> None:
    """Two raw rewards of every point; a colour for each method, a marker for each alpha."""
    names = comparison["rewards"]
    for i, method in enumerate(comparison["methods"]):
        for j, (_, points) in enumerate(_by_alpha(method["points"], names)):
            across, up = ([_coordinate(point, axis) for point in points] for axis in (x, y))
            ax.errorbar(
                _means(across),
                _means(up),
                xerr=_reach(across),
                yerr=_reach(up),
                color=f"C{i}",
                fmt=MARKERS[j % len(MARKERS)],
                linestyle="-" if len(names) == 2 else "",
                linewidth=1,
                elinewidth=0.3,
                markersize=4,
                label=method["label"] if j == 0 else None,
            )
    reference = {"kl": 0.0, **comparison["reference"]["rewards"]}
    at = drawn(reference[x]), drawn(reference[y])
    ax.scatter(*at, c="black", marker="*", s=90, label="reference")
    ax.set_xlabel(axis_label(x, names))
    ax.set_ylabel(y)


def _draw_by_preference(ax: Axes, comparison: Mapping[str, Any], what: str) -> None:
    """A number of every point, with its interval: by w of two rewards, else point by point."""
    methods, names = comparison["methods"], comparison["rewards"]
    for i, method in enumerate(methods):
        if what == "value_difference" and method["label"] == comparison["against"]:
            ax.axhline(0, color=f"C{i}", linewidth=1)
            continue
        for j, (_, points) in enumerate(_by_alpha(method["points"], names)):
            known = [point for point in points if point.get(what)]
            x = _places(known, names)
            line = _LINES[j % len(_LINES)]
            each = [point[what] for point in known]
            ax.plot(x, _means(each), color=f"C{i}", linestyle=line, marker=".", linewidth=1)
            low, high = ([drawn(e[end]) for e in each] for end in ("low", "high"))
            ax.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
            if what == "value" and i == 0:
                reference = [drawn(point["value_reference"]) for point in known]
                ax.plot(x, reference, color="black", linestyle=line, linewidth=1)
    if len(names) == 2:
        ax.set_xlabel(f"weight of {names[0]}")
        return
    _, points = _by_alpha(methods[0]["points"], names)[0]
    labels = [point_label(point, names) for point in points]
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize="x-small")
    ax.set_xlabel(" / ".join(names))


def _places(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[float]:
    if len(names) == 2:
        return [point["weights"][names[0]] for point in points]
    return [float(place) for place in range(len(points))]


def _by_alpha(
    points: Sequence[dict[str, Any]], names: Sequence[str]
) -> list[tuple[float, list[dict[str, Any]]]]:
    """Points of each alpha, in the order of their weights."""
    ordered = sorted(points, key=lambda point: [-point["weights"][name] for name in names])
    alphas = sorted({point["alpha"] for point in points})
    return [(alpha, [p for p in ordered if p["alpha"] == alpha]) for alpha in alphas]


def _coordinate(point: Mapping[str, Any], axis: str) -> Mapping[str, float | None]:
    found: Mapping[str, float | None] = {"kl": point["kl"], **point["rewards"]}[axis]
    return found


def _means(numbers: Sequence[Mapping[str, float | None]]) -> list[float]:
    return [drawn(number["mean"]) for number in numbers]


def _reach(numbers: Sequence[Mapping[str, float | None]]) -> list[list[float]]:
    """How far the intervals reach below and above, for matplotlib; a mean may lie outside."""
    low = [drawn(e["mean"]) - drawn(e["low"]) for e in numbers]
    high = [drawn(e["high"]) - drawn(e["mean"]) for e in numbers]
    return [[max(value, 0.0) for value in side] for side in (low, high)]
