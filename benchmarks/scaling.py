"""How the cost of our step grows with each of its sizes.

    python benchmarks/scaling.py [--axes rewards new_tokens ...] [--plot build/scaling.png]

One size of a LoRA-CLP step on a small Llama is changed at a time; the changed step and the base
take turns, and their ratio is what is shown, as a table and on a log-log plot. The growth between
two points is the slope there: 1 is linear. Above 1.1 the phase that grew most is named, with what
makes the work itself grow so. `processes` is a DDP training of its own with the same work in each
process; its cost is seconds a step against one process: 1 is perfect, and where all share the same
cores their number is to be expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import loops
import speed
import torch
from lightning.pytorch import Callback
from speed import Machine, Size

from clp_lightning import LoRA, PromptDataModule

AXES: dict[str, list[int]] = {
    "rewards": [1, 2, 4, 8],
    "preferences": [1, 2, 4, 8],
    "samples": [2, 4, 8, 16],
    "prompt_tokens": [16, 32, 64, 128, 256],
    "new_tokens": [16, 32, 64, 128],
    "width": [128, 256, 512],
    "layers": [4, 8, 16],
}
# Why an axis may grow faster than its size.
WHY = {
    "prompt_tokens": "every token attends to all before it",
    "new_tokens": "every token attends to all before it",
    "width": "weights grow with the square of the width",
}
PROCESSES = [1, 2]
SUPERLINEAR = 1.1


def changed(size: Size, axis: str, value: int) -> Size:
    """``size`` with another number of what ``axis`` counts."""
    if axis == "width":
        grown = {"hidden_size": value, "intermediate_size": value * 11 // 4}
        return dataclasses.replace(size, fields=size.fields | grown)
    if axis == "layers":
        return dataclasses.replace(size, fields=size.fields | {"num_hidden_layers": value})
    if axis == "preferences":  # as many prompts, each under its own or all under fewer
        return size
    name = "num_rewards" if axis == "rewards" else axis
    return dataclasses.replace(size, **{name: value})


def sweep(
    axis: str, values: list[int], base: Size, args: argparse.Namespace, machine: Machine
) -> list[dict[str, Any]]:
    """Every value of one axis beside the base."""
    points = []
    for value in values:
        with tempfile.TemporaryDirectory() as scratch:
            points.append(_point(axis, value, base, args, machine, Path(scratch)))
        show(axis, points)
    return points


def _point(
    axis: str, value: int, base: Size, args: argparse.Namespace, machine: Machine, scratch: Path
) -> dict[str, Any]:
    steps = args.warmup + args.rounds
    pair = []
    for name, size in (("base", base), ("changed", changed(base, axis, value))):
        folder = speed.save_model(scratch / name, size)
        more: dict[str, Any] = {}
        if axis == "preferences" and name == "changed":
            more["kind"] = _fewer(value)
        pair.append(loops.clp_loop(name, size, folder, LoRA(), steps, machine, **more))
    found = loops.take_turns(pair, args.rounds, args.warmup)
    for loop in pair:
        loop.close()
    phases = {phase for row in found["changed"] for phase in row if phase != "step"}
    return {
        "value": value,
        "cost": loops.ratio(found["changed"], found["base"]),
        "seconds": loops.median(found["changed"], "step"),
        "phases": {phase: loops.median(found["changed"], phase) for phase in phases},
    }


def _fewer(count: int) -> type[loops.CLPModule]:
    """A module whose prompts share ``count`` preferences."""

    class Fewer(loops.CLPModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch.preference is not None
            batch.preference = batch.preference[torch.arange(len(batch)) % count]
            return super().training_step(batch, batch_idx)

    return Fewer


def processes(base: Size, args: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """The base step in one process and in several, each with a batch of its own."""
    points: list[dict[str, Any]] = []
    for count in PROCESSES:
        command = [sys.executable, __file__, "--worker", str(count), "--size", args.size]
        command += ["--rounds", str(args.rounds), "--warmup", str(args.warmup)]
        command += ["--device", machine.device, "--clock", machine.clock]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        seconds = json.loads(run.stdout.splitlines()[-1])
        cost = seconds / points[0]["seconds"] if points else 1.0
        points.append({"value": count, "cost": cost, "seconds": seconds, "phases": {}})
    show("processes", points)
    return points


def worker(count: int, size: Size, args: argparse.Namespace, machine: Machine) -> None:
    """One of the processes; the first prints the median seconds of a step."""
    ends: list[float] = []

    class Clock(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(machine.now())

    with tempfile.TemporaryDirectory() as scratch:
        folder = speed.save_model(Path(scratch), size)
        module = loops.make_module(size, folder, LoRA())
        data = PromptDataModule(speed.prompt_rows(size), holdout=0, batch_size=size.prompts, seed=0)
        trainer = loops.make_trainer(
            args.warmup + args.rounds + 1,
            machine,
            Clock(),
            devices=count,
            strategy="ddp" if count > 1 else "auto",
        )
        trainer.fit(module, datamodule=data)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        gaps = [{"step": after - before} for before, after in pairwise(ends[args.warmup :])]
        print(json.dumps(loops.median(gaps, "step")))


def slope(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Growth of the cost between two points, as an exponent."""
    return math.log(after["cost"] / before["cost"]) / math.log(after["value"] / before["value"])


def show(axis: str, points: list[dict[str, Any]]) -> None:
    """Prints the last point, its growth, and what grew where that is worse than linear."""
    last = points[-1]
    text = f"{axis:14}{last['value']:>6}{last['cost']:>9.2f}{1e3 * last['seconds']:>10.1f} ms"
    if len(points) > 1:
        before = points[-2]
        text += f"{slope(before, last):>8.2f}"
        if slope(before, last) > SUPERLINEAR and last["phases"]:
            grown = {p: s - before["phases"].get(p, 0.0) for p, s in last["phases"].items()}
            phase = max(grown, key=lambda p: grown[p])
            why = f": {WHY[axis]}" if axis in WHY else ""
            text += f"  worse than linear, most in {phase}{why}"
    print(text, flush=True)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Costs against sizes, on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, points in found.items():
        values = [point["value"] / points[0]["value"] for point in points]
        costs = [point["cost"] / points[0]["cost"] for point in points]
        axes.plot(values, costs, marker="o", label=name.replace("_", " "))
    most = max(p["value"] / points[0]["value"] for points in found.values() for p in points)
    axes.plot([1, most], [1, most], color="grey", linestyle=":", label="linear")
    axes.set(
        xscale="log", yscale="log", xlabel="size against the smallest", ylabel="cost of a step"
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Sweeps the axes."""
    parser = speed.parser(__doc__)
    names = [*AXES, "processes"]
    parser.add_argument("--axes", nargs="+", choices=names, default=names)
    parser.add_argument("--points", type=int, help="of every axis, the first so many")
    parser.add_argument("--plot", type=Path, default=Path("build/scaling.png"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    base, machine = speed.chosen_size(args), speed.choose_machine(args)
    if args.worker:
        worker(args.worker, base, args, machine)
        return 0
    print(f"{'axis':14}{'size':>6}{'cost':>9}{'step':>13}{'growth':>8}")
    found = {}
    for axis in args.axes:
        if axis == "processes":
            found[axis] = processes(base, args, machine)
        else:
            found[axis] = sweep(axis, AXES[axis][: args.points], base, args, machine)
    plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
