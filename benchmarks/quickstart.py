"""The quickstart's training before the work on speed and now: its time, and how it steers.

    python benchmarks/quickstart.py [--before REVISION] [--target 0.6] [--clock cpu]

Both run `configs/quickstart.yaml` of their own revision, with the same seed and number of steps,
from the base in runs/warmup (`make quickstart` writes it), one after the other. Exits with 1 where
the time is more than the target's share, or where a gain lies outside its interval before.
On a machine that others use ``--clock cpu`` on one thread (OMP_NUM_THREADS=1) tells more: the
processor's seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from shared import machine

ROOT = Path(__file__).parents[1]
Found = tuple[float, dict[str, Any]]
GAINS = ("value_gain", "steering_gain")


def train(checkout: Path, runs: Path, seconds: Callable[[], float]) -> Found:
    """What the command takes, and the metrics of its front."""
    command = [sys.executable, "-m", "clp_lightning", "fit", "--config", "configs/quickstart.yaml"]
    command += ["--trainer.logger.init_args.save_dir", str(runs)]
    command += ["--model.init_args.pretrained", str(ROOT / "runs/warmup/base")]
    env = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    start = seconds()
    with (runs / "log.txt").open("w") as log:
        subprocess.run(command, cwd=checkout, env=env, stdout=log, stderr=log, check=True)
    took = seconds() - start
    (front,) = runs.glob("quickstart/**/front.json")
    return took, json.loads(front.read_text())["metrics"]


def processor_seconds() -> float:
    """Of the commands that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> int:
    """Runs and compares both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="a54a3aa~1", help="a revision of this repository")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    if not (ROOT / "runs/warmup/base").exists():
        parser.error("runs/warmup/base is not there; run `make quickstart` first.")
    seconds = time.perf_counter if args.clock == "wall" else processor_seconds
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{date.today()}, {machine()}; threads: {threads}, {args.clock} clock")
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), args.before], check=True)
        try:
            for name, checkout in (("before", before), ("now", ROOT)):
                runs = Path(scratch) / f"runs-{name}"
                runs.mkdir()
                found[name] = train(checkout, runs, seconds)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    kept = True
    for name, (took, metrics) in found.items():
        cells = [f"{gain} {shown(metrics[gain])}" for gain in GAINS]
        print(f"{name:8}{took:8.0f} s  {', '.join(cells)}")
    for gain in GAINS:
        old, new = (found[name][1][gain] for name in ("before", "now"))
        kept &= old["low"] <= new["mean"] <= old["high"]
    ratio = found["now"][0] / found["before"][0]
    print(f"ratio now/before: {ratio:.2f}, gains {'alike' if kept else 'differ'}")
    return int(ratio > args.target or not kept)


def shown(number: dict[str, float]) -> str:
    """A number and its interval."""
    return f"{number['mean']:.2f} [{number['low']:.2f}, {number['high']:.2f}]"


if __name__ == "__main__":
    sys.exit(main())
