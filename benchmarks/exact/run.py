"""Runs every method on the exactly solvable task, and writes the report.

    python -m benchmarks.exact.run [--jobs 2] [--only PATTERN] [--out runs/benchmark-exact]

plan.py says what is run. A run whose front lies in ``--out`` and was made from the same config is
not repeated, so a benchmark that was stopped goes on where it was. The report is README.md beside
this file. One core per job.
"""

from __future__ import annotations

import argparse
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from ..shared import run_command
from .plan import Run, plan, slug
from .report import write_report

CONFIGS = Path(__file__).parents[2] / "configs" / "exact"


def change_entries(config: Any, change: dict[str, Any]) -> None:
    """Sets ``a.b.0.c`` of nested dicts and lists."""
    for path, value in change.items():
        *parents, last = path.split(".")
        node = config
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[last] = value


def build_config(run: Run, out: Path) -> dict[str, Any]:
    """The config of a run, complete."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{run.config}.yaml").read_text())
    base = Path(config["data"]["init_args"]["folder"]).relative_to("runs/exact")
    place = {"save_dir": str(out), "name": run.name}
    change_entries(config, {"seed_everything": run.seed, "trainer.val_check_interval": 10**9})
    config["trainer"]["logger"]["init_args"] |= place
    for part, key in (("data", "folder"), ("model", "pretrained")):
        config[part]["init_args"][key] = str(out / "bases" / base)
    change_entries(config, run.change)
    return config


def perform(run: Run, out: Path) -> bool:
    """Trains or evaluates, unless that was done; False where it failed."""
    folder = out / run.name
    text = yaml.safe_dump(build_config(run, out), sort_keys=False)
    file = folder.with_suffix(".yaml")
    if (folder / "front.json").exists() and file.exists() and file.read_text() == text:
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder / "front.json").unlink(missing_ok=True)
    file.write_text(text)
    command = ["test" if run.of else "fit", "--config", str(file)]
    if run.of:
        command += ["--ckpt_path", str(out / run.group / f"{slug(run.of)}-{run.seed}")]
    log = folder.with_suffix(".log")
    done = run_command(command, log)
    print(f"{run.name}: {'done' if done else f'FAILED, see {log}'}", flush=True)
    return done


def main() -> int:
    """0 where every run succeeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-exact"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", default="", help="regular expression on GROUP/LABEL-SEED")
    args = parser.parse_args()
    runs = [run for run in plan() if re.search(args.only, run.name)]
    trained = [run for run in runs if not run.of]
    evaluated = [run for run in runs if run.of]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [*pool.map(lambda run: perform(run, args.out), trained)]
        done += pool.map(lambda run: perform(run, args.out), evaluated)
    if not args.only:
        write_report(args.out)
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
