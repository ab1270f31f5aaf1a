"""Puts what Watchmen see of the quickstart into quickstart.csv and quickstart.json, from its runs.

    python -m clp_lightning fit --config configs/quickstart.yaml --seed_everything 1
    python -m tests.callbacks.record runs/quickstart

Of seeds that are not among the runs it keeps what it has.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, FRONTS = (Path(__file__).with_name(f"quickstart.{kind}") for kind in ("csv", "json"))


def main(runs: list[str]) -> None:
    """Reads the folders of ``runs``."""
    fronts: dict[str, dict[str, Any]] = json.loads(FRONTS.read_text()) if FRONTS.exists() else {}
    with STEPS.open() as file:
        header, *rows = csv.reader(file)
    for run in runs:
        front = json.loads((Path(run) / "front.json").read_text())
        seed = str(front["seed"])
        fronts[seed] = front["metrics"]
        events = EventAccumulator(run).Reload()
        columns = [events.Scalars(f"train/{name}") for name in header[2:]]
        rows = [row for row in rows if row[0] != seed]
        for scalars in zip(*columns, strict=True):
            numbers = [f"{scalar.value:.3f}" for scalar in scalars]
            rows.append([seed, str(scalars[0].step), *numbers])
    rows.sort(key=lambda row: (int(row[0]), int(row[1])))
    with STEPS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    FRONTS.write_text(json.dumps(fronts, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
