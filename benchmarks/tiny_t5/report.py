"""Fills README.template.md with what the fronts say."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from clp_lightning.compare import compare
from clp_lightning.compare.figure import plot_comparison
from clp_lightning.tables import markdown_table, point_label

from ..shared import machine
from ..smollm2.report import as_section, corner_table, run_table

__all__ = ["write_report"]

HERE = Path(__file__).parent


def write_report(runs: Path, methods: Mapping[str, str]) -> None:
    """Writes README.md and compare.png.

    Args:
        runs: Holds a run's folder for every method; its front may be missing.
        methods: Label of every method.
    """
    found = {label: runs / name for name, label in methods.items()}
    missing = [label for label, run in found.items() if not (run / "front.json").exists()]
    found = {label: run for label, run in found.items() if label not in missing}
    comparison = compare([f"{label}={run}" for label, run in found.items()], str(runs / "compare"))
    plot_comparison(comparison).savefig(HERE / "compare.png", dpi=64)
    fronts = {label: json.loads((run / "front.json").read_text()) for label, run in found.items()}
    text = string.Template((HERE / "README.template.md").read_text()).substitute(
        missing=f"**Not run: {', '.join(missing)}.**\n\n" * bool(missing),
        supervised=supervised_table(runs),
        corners=corner_table(comparison),
        runs=run_table({label: {0: run} for label, run in found.items()}),
        points=point_table(next(iter(fronts.values())), next(iter(found.values()))),
        lengths=length_table(fronts, found),
        comparison=as_section((runs / "compare" / "compare.md").read_text()),
        prompts=comparison["prompts"],
        machine=machine(),
        date=date.today().isoformat(),
    )
    (HERE / "README.md").write_text(text)
    print(f"report: {HERE / 'README.md'}")


def supervised_table(runs: Path) -> str:
    """Held-out loss and ROUGE-L of the random model and of the reference."""
    rows = []
    for name in ("before", "after"):
        with (runs / name / "metrics.csv").open() as stream:
            (measured,) = csv.DictReader(stream)
        rows.append([name, *(f"{float(measured[f'val/{n}']):.3f}" for n in ("loss", "rougeL"))])
    return markdown_table(["", "held-out loss, nats per token", "ROUGE-L, greedy"], rows)


def empty_shares(run: Path) -> dict[int, float]:
    """By point of the front (-1 is the reference) the share of responses without a single word."""
    samples = pd.read_parquet(run / "front_samples.parquet")
    empty: dict[int, float] = (samples["length"] <= 1).groupby(samples["point"]).mean().to_dict()
    return empty


def point_table(front: Mapping[str, Any], run: Path) -> str:
    """Every point of a front, with the length of its responses."""
    names, empty = front["rewards"], empty_shares(run)
    rows = [
        [
            "reference" if number < 0 else point_label(point, names),
            *(f"{point['rewards'][name]:.3f}" for name in names),
            f"{point['kl']:.1f}",
            f"{point['length']:.1f}",
            f"{empty[number]:.1%}",
            f"{point['truncated']:.0%}",
        ]
        for number, point in enumerate([front["reference"], *front["points"]], start=-1)
    ]
    return markdown_table(["", *names, "KL, nats", "tokens", "empty", "cut at the limit"], rows)


def length_table(fronts: Mapping[str, Any], found: Mapping[str, Path]) -> str:
    """The range of lengths over every method's points, and the most empty responses."""
    rows = []
    for label, front in fronts.items():
        lengths = [point["length"] for point in front["points"]]
        empty = max(empty_shares(found[label]).values())
        rows.append([label, f"{min(lengths):.1f} to {max(lengths):.1f}", f"{empty:.1%}"])
    return markdown_table(["", "mean tokens, all points", "empty, worst point"], rows)
