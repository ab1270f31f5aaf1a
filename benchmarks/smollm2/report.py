"""Fills README.template.md with what the fronts say."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from clp_lightning.compare import compare
from clp_lightning.compare.figure import plot_comparison
from clp_lightning.functional import dial_passes
from clp_lightning.tables import markdown_table

from ..shared import machine

__all__ = ["write_report"]

HERE = Path(__file__).parent


def write_report(methods: Mapping[str, Mapping[int, Path]], configs: Mapping[str, Path]) -> None:
    """Writes README.md and compare.png.

    Args:
        methods: For every label and seed the run's folder, whose front may be missing.
        configs: A config by the name that the template gives its learning rate.
    """
    found = {
        label: {seed: run for seed, run in runs.items() if (run / "front.json").exists()}
        for label, runs in methods.items()
    }
    missing = [
        f"{label}, seed {seed}"
        for label, runs in methods.items()
        for seed in runs
        if seed not in found[label]
    ]
    out = next(iter(next(iter(methods.values())).values())).parent / "compare"
    specs = [f"{label}={run}" for label, runs in found.items() for run in runs.values()]
    comparison = compare(specs, str(out))
    plot_comparison(comparison).savefig(HERE / "compare.png", dpi=64)
    text = string.Template((HERE / "README.template.md").read_text()).substitute(
        missing=f"**Not run: {'; '.join(missing)}.**\n\n" * bool(missing),
        by_value=order(comparison, "value_gain"),
        by_steering=order(comparison, "steering_gain"),
        kl=", ".join(sorted({kl_form(run) for runs in found.values() for run in runs.values()})),
        corners=corner_table(comparison),
        runs=run_table(found),
        comparison=as_section((out / "compare.md").read_text()),
        prompts=comparison["prompts"],
        machine=machine(),
        date=date.today().isoformat(),
        **learning_rates(configs),
    )
    (HERE / "README.md").write_text(text)
    print(f"report: {HERE / 'README.md'}")


def learning_rates(configs: Mapping[str, Path]) -> dict[str, str]:
    """Of every config as ``lr_NAME``; that of a shared part beside another as ``lr_adapter``."""
    found = {}
    for name, path in configs.items():
        arguments = yaml.safe_load(path.read_text())["model"]["init_args"]
        found[f"lr_{name}"] = f"{arguments['lr']:g}"
        if "lr_shared" in arguments:
            found["lr_adapter"] = f"{arguments['lr_shared']:g}"
    return found


def as_section(text: str) -> str:
    """compare.md as a part of another page, which has a title and the picture already."""
    lines = [line for line in text.splitlines() if not line.startswith(("# ", "!["))]
    section = "\n".join(f"#{line}" if line.startswith("## ") else line for line in lines)
    return re.sub(r"\n{3,}", "\n\n", section).strip()


def kl_form(run: Path) -> str:
    """The KL in the return of a run, as its config names it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    return f"`{config['model']['init_args']['kl']}`"


def order(comparison: Mapping[str, Any], metric: str) -> str:
    """The methods by one of their numbers."""
    found = {m["label"]: m["metrics"][metric]["mean"] for m in comparison["methods"]}
    return " > ".join(
        f"{label} ({found[label]:.2f})" for label in sorted(found, key=found.get)[::-1]
    )


def corner_table(comparison: Mapping[str, Any]) -> str:
    """Every reward where all the weight is on it, and the KL that it takes."""
    names = comparison["rewards"]
    reference = [shown(comparison["reference"]["rewards"][name]) for name in names]
    rows = [["reference", *reference, "0"]]
    for method in comparison["methods"]:
        at = [
            next(point for point in method["points"] if point["weights"][name] == 1)
            for name in names
        ]
        best = [interval(point["rewards"][name]) for point, name in zip(at, names, strict=True)]
        kl = " / ".join(f"{point['kl']['mean']:.1f}" for point in at)
        rows.append([method["label"], *best, kl])
    head = ["", *(f"{name} at {name} = 1" for name in names), "KL there, nats"]
    return markdown_table(head, rows)


def run_table(methods: Mapping[str, Mapping[int, Path]]) -> str:
    """Every run alone, each measured against its own reference in its own units."""
    measures = ["value gain", "steering gain (predicted)", "consistency", "envy", "largest KL"]
    rows = []
    for label, runs in methods.items():
        for seed, run in runs.items():
            front = json.loads((run / "front.json").read_text())
            metrics = front["metrics"]
            steering = metrics["steering_gain"]
            rows.append(
                [
                    f"{label}, {seed}",
                    interval(metrics["value_gain"]),
                    f"{interval(steering)} ({shown(steering['predicted'])})",
                    interval(metrics["consistency"]),
                    interval(metrics["envy"]),
                    f"{max(point['kl'] for point in front['points']):.1f}",
                    "passes" if dial_passes(front) else "fails",
                ]
            )
    return markdown_table(["method, seed", *measures, "dial"], rows)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def interval(number: Mapping[str, float | None] | None) -> str:
    if number is None or number["low"] is None:
        return shown(number and number["mean"])
    return f"{shown(number['mean'])} [{shown(number['low'])}, {shown(number['high'])}]"
