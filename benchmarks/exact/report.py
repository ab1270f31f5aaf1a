"""Writes README.md and its pictures from the fronts that run.py left."""

from __future__ import annotations

import json
import string
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from clp_lightning.compare import compare
from clp_lightning.tables import markdown_table

from ..shared import machine
from .plan import plan

__all__ = ["write_report"]

HERE = Path(__file__).parent
# Closed gap that issue and design ask for: mean and worst weighting.
TARGETS = {
    "full-CLP": (0.998, 0.995),
    "attention-CLP": (0.997, 0.99),
    "LoRA-CLP": (0.997, 0.99),
    "logit-CLP": (0.99, 0.98),
    "soft-prompt-CLP": (0.997, 0.99),
    "full-CLP, alpha sampled": (0.99, 0.98),
    "full-CLP, K = 3": (0.995, 0.99),
}
LEVELS = ("0.9", "0.95", "0.99")


class Results:
    """The fronts of all runs, by group and label; seeds whose run is missing are left out."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.fronts: dict[tuple[str, str], dict[int, Any]] = {}
        self.missing: list[str] = []
        for run in plan():
            file = out / run.name / "front.json"
            if file.exists():
                fronts = self.fronts.setdefault((run.group, run.label), {})
                fronts[run.seed] = json.loads(file.read_text())
            else:
                self.missing.append(run.name)

    def labels(self, group: str) -> list[str]:
        return [label for found, label in self.fronts if found == group]

    def gaps(self, group: str, label: str) -> np.ndarray:
        """Closed gap, shape (seeds, points)."""
        fronts = self.fronts[group, label].values()
        return np.array([front["metrics"]["closed_gap"]["points"] for front in fronts])

    def cost(self, group: str, label: str) -> dict[str, Any]:
        """What a run cost, wall time as the mean over seeds."""
        costs = [front["cost"] for front in self.fronts[group, label].values()]
        return costs[0] | {"wall_s": float(np.mean([cost["wall_s"] for cost in costs]))}


def span(values: np.ndarray, digits: int = 4) -> str:
    """Mean over seeds, and the range where there is one."""
    mean = f"{values.mean():.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def gap_cells(results: Results, group: str, label: str) -> list[str]:
    """Mean and worst over the weightings, and whether both reach what was asked."""
    gaps = results.gaps(group, label)
    mean, worst = gaps.mean(1), gaps.min(1)
    cells = [span(mean), span(worst)]
    if label in TARGETS:
        wanted = TARGETS[label]
        met = mean.mean() >= wanted[0] and worst.min() >= wanted[1]
        cells.append(f"{wanted[0]} / {wanted[1]}: {'reached' if met else 'not reached'}")
    else:
        cells.append("")
    return cells


def missing_runs(results: Results) -> str:
    """What the tables lack, in words; empty where all runs are in."""
    if not results.missing:
        return ""
    share = f"{len(results.missing)} of {len(plan())}"
    return f"**Not run yet: {share} runs.** Columns `seeds` say which.\n"


def methods_table(results: Results) -> str:
    """Closed gaps of the methods, and what they cost."""
    rows = []
    for label in results.labels("methods"):
        cost = results.cost("methods", label)
        rows.append(
            [
                label,
                str(len(results.fronts["methods", label])),
                *gap_cells(results, "methods", label),
                f"{cost['optimizer_steps']:,}",
                f"{cost['sampled_tokens']:,}",
                f"{cost['trained_parameters']:,}",
                str(cost["models"]),
                str(cost["forwards"]),
                f"{cost['wall_s']:.0f}",
            ]
        )
    head = ["method", "seeds", "closed gap, mean", "worst weighting", "asked", "steps", "tokens"]
    return markdown_table([*head, "trained parameters", "models", "forwards", "wall s"], rows)


def plain_table(results: Results, group: str) -> str:
    """Closed gaps of one group of runs."""
    rows = [
        [label, str(len(results.fronts[group, label])), *gap_cells(results, group, label)]
        for label in results.labels(group)
    ]
    return markdown_table(["run", "seeds", "closed gap, mean", "worst", "asked"], rows)


def difference_table(results: Results, ours: str, rival: str) -> str:
    """Closed gap of two methods by weighting, and their difference with an interval over seeds."""
    a, b = results.gaps("methods", ours), results.gaps("methods", rival)
    n = min(len(a), len(b))
    difference = a[:n] - b[:n]
    half = np.zeros(len(difference[0]))
    if n > 1:
        half = student.ppf(0.975, n - 1) * difference.std(0, ddof=1) / np.sqrt(n)
    points = next(iter(results.fronts["methods", ours].values()))["points"]
    rows = [
        [
            f"{point['weights']['first']:.1f}",
            f"{a[:, i].mean():.4f}",
            f"{b[:, i].mean():.4f}",
            f"{difference[:, i].mean():+.4f}" + (f" ± {half[i]:.4f}" if n > 1 else ""),
        ]
        for i, point in enumerate(points)
    ]
    return markdown_table(["weight of `first`", ours, rival, "difference, 95 %"], rows)


def hard_table(results: Results) -> str:
    """The hard level at its full budget, and what each level of the closed gap needed."""
    rows = []
    for label in results.labels("hard"):
        fronts = results.fronts["hard", label].values()
        curves = [front["metrics"]["closed_gap_curve"] for front in fronts]
        last = [curve["points"][-1] for curve in curves]
        ends = [
            span(np.array([point[kind][which] for point in last]), 3)
            for kind in ("seen", "unseen")
            for which in ("mean", "worst")
        ]
        rows.append([label, str(len(curves)), *ends, *map(needed(curves).get, LEVELS)])
    ends = ["seen, mean", "seen, worst", "unseen, mean", "unseen, worst"]
    return markdown_table(
        ["method", "seeds", *ends, *(f"tokens for {level}" for level in LEVELS)], rows
    )


def hard_points(results: Results, label: str) -> str:
    """The closed gap on seen contexts by weighting."""
    gaps = results.gaps("hard", label)
    points = next(iter(results.fronts["hard", label].values()))["points"]
    rows = [
        [" + ".join(f"{w:g} {name}" for name, w in point["weights"].items() if w), span(gap, 3)]
        for point, gap in zip(points, gaps.T, strict=True)
    ]
    return markdown_table(["weights", "closed gap"], rows)


def needed(curves: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Sampled tokens for a level, mean over seeds; a dash where a seed did not reach it."""
    cells = {}
    for level in LEVELS:
        found = [
            curve["needed"][level] and curve["needed"][level] * tokens_per_response(curve)
            for curve in curves
        ]
        cells[level] = "-" if None in found else f"{np.mean(found):,.0f}"
    return cells


def tokens_per_response(curve: dict[str, Any]) -> float:
    """Of a whole run."""
    point = curve["points"][-1]
    return float(point["sampled_tokens"] / point["responses"])


def draw_hard(results: Results, file: Path) -> None:
    """Closed gap against sampled tokens, on seen and on unseen contexts."""
    figure, axes = new_figure()
    for ax, kind in zip(axes, ("seen", "unseen"), strict=True):
        for label in results.labels("hard"):
            fronts = results.fronts["hard", label].values()
            curves = [front["metrics"]["closed_gap_curve"]["points"] for front in fronts]
            tokens = [point["sampled_tokens"] for point in curves[0]]
            gaps = np.array([[point[kind]["mean"] for point in curve] for curve in curves])
            ax.plot(tokens, gaps.mean(0), marker="o", markersize=3, label=label)
        ax.set_xscale("log")
        ax.set_xlabel("sampled tokens")
        ax.set_ylabel(f"closed gap, {kind} contexts")
        ax.set_ylim(0, 1)
    axes[0].legend(fontsize="x-small")
    figure.savefig(file, dpi=90)


def new_figure() -> tuple[Any, Any]:
    """A figure of two panels that belongs to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    return figure, figure.subplots(1, 2)


def draw_methods(results: Results, file: Path) -> None:
    """Closed gap by weighting, the range over seeds shaded; twice, once for what lies high."""
    figure, axes = new_figure()
    for ax, low in zip(axes, (None, 0.985), strict=True):
        for label in results.labels("methods"):
            gaps = results.gaps("methods", label)
            points = next(iter(results.fronts["methods", label].values()))["points"]
            weight = [point["weights"]["first"] for point in points]
            (line,) = ax.plot(weight, gaps.mean(0), marker="o", markersize=3, label=label)
            ax.fill_between(weight, gaps.min(0), gaps.max(0), alpha=0.2, color=line.get_color())
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_ylim(bottom=low, top=1.001 if low else None)
        ax.set_xlabel("weight of the first reward")
        ax.set_ylabel("closed gap (1 = the optimum)")
    axes[0].legend(fontsize="x-small")
    figure.savefig(file, dpi=90)


def commit() -> str:
    """What the checkout is at."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def compare_methods(results: Results) -> str:
    """The library's own comparison of the sampled fronts; its picture goes beside the report."""
    runs = [
        f"{run.label}={results.out / run.name}"
        for run in plan()
        if run.group == "methods" and run.seed in results.fronts.get(("methods", run.label), {})
    ]
    folder = results.out / "compare"
    compare(runs, out=str(folder))
    (HERE / "compare.png").write_bytes((folder / "compare.png").read_bytes())
    return (folder / "compare.md").read_text()


def write_report(out: Path) -> None:
    """Everything that README.template.md names, from what is there; missing runs are left out."""
    results = Results(out)
    draw_methods(results, HERE / "methods.png")
    draw_hard(results, HERE / "hard.png")
    (HERE / "compare.md").write_text(compare_methods(results))
    template = string.Template((HERE / "README.template.md").read_text())
    text = template.substitute(
        missing=missing_runs(results),
        methods=methods_table(results),
        difference=difference_table(results, "full-CLP", "Rewarded Soups"),
        hard=hard_table(results),
        hard_points=hard_points(results, "full-CLP"),
        machine=machine(),
        commit=commit(),
        date=date.today().isoformat(),
        **{group: plain_table(results, group) for group in ("alpha", "others", "ablations")},
    )
    (HERE / "README.md").write_text(text)
    print(f"report: {HERE / 'README.md'}")
