"""A tiny T5 from random weights to a dial, by five methods, compared; writes the README here.

    python -m benchmarks.tiny_t5.run [--jobs 2] [--only PATTERN] [--report]

Builds the model and its tokenizer, makes the reference policy by supervised finetuning, trains
every method from it and compares the fronts. A run whose files lie in runs/tiny_t5 is not
repeated. Ends with status 1 where a run failed or full-CLP's dial does not pass. One core per job.
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clp_lightning.functional import dial_passes

from ..shared import run_command
from ..smollm2.run import fit
from .base import build
from .report import write_report

RUNS = Path("runs/tiny_t5")
CONFIGS = Path("configs/tiny_t5")
METHODS = {
    "full": "full-CLP",
    "attention": "attention-CLP",
    "logits": "logit-CLP",
    "prompt": "prompt-CLP",
    "soups": "Rewarded Soups",
}


def prepare() -> bool:
    """The random model, the reference policy from it, and what both know; False where it failed."""
    if not (RUNS / "random" / "config.json").exists():
        build(RUNS / "random")
    config, base = CONFIGS / "supervised.yaml", RUNS / "supervised" / "base"
    if not (base / "config.json").exists() and not fit(str(config), RUNS / "supervised.log"):
        return False
    return measure("before", RUNS / "random") and measure("after", base)


def measure(name: str, model: Path) -> bool:
    """Held-out loss and ROUGE-L of a model, unless that was done; False where it failed."""
    if (RUNS / name / "metrics.csv").exists():
        return True
    changes = {"model.pretrained": model, "trainer.logger.init_args.name": f"tiny_t5/{name}"}
    arguments = [f"--{key}={value}" for key, value in changes.items()]
    config = str(CONFIGS / "supervised.yaml")
    return run_command(["validate", "--config", config, *arguments], RUNS / f"{name}.log")


def perform(method: str) -> bool:
    """Trains and measures a method, unless that was done; False where it failed."""
    if (RUNS / method / "front.json").exists():
        return True
    return fit(str(CONFIGS / f"{method}.yaml"), RUNS / f"{method}.log")


def main() -> int:
    """Runs what is missing, then writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", default="", help="regular expression on the method")
    parser.add_argument("--report", action="store_true", help="write the report, train nothing")
    args = parser.parse_args()
    done = True
    if not args.report:
        if not prepare():
            return 1
        with ThreadPoolExecutor(args.jobs) as pool:
            done = all([*pool.map(perform, (m for m in METHODS if re.search(args.only, m)))])
    write_report(RUNS, METHODS)
    front = RUNS / "full" / "front.json"
    passes = front.exists() and dial_passes(json.loads(front.read_text()))
    print(f"The dial of full-CLP {'passes' if passes else 'FAILS'}: {front}")
    return 0 if done and passes else 1


if __name__ == "__main__":
    raise SystemExit(main())
